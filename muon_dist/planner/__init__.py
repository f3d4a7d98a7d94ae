"""Jobs that do not run: models by their shapes, where ranks would keep them, and the plan that the optimizer would make."""
