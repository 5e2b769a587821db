"""What a training loop calls: the Run object, its inputs, evaluation, measurements and logs."""
