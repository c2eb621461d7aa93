"""Published encoders beside ours."""
