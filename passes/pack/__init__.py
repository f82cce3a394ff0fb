"""The family that stores weights in fewer bytes, exactly."""
