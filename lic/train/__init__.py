"""Training: data, loss, schedule, export. Needs neither torchac nor a compiler."""
