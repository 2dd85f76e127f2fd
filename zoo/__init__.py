"""Every architecture that users bring: a sweep over three libraries, one process for each model."""
