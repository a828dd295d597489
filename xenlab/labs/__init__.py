"""What a lesson imports: one scene per chapter, ready to run."""
