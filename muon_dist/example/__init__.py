"""The small models that launch/ trains, and that the benches measure."""
