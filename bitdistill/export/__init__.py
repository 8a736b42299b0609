"""From a student to a file, and the proof that the file equals what was trained."""
