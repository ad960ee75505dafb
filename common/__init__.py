"""What every script shares and no algorithm decides: arguments, data, the run folder, evaluation."""
