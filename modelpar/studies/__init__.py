"""Tables and figures over trainings."""
