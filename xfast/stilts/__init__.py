"""STILTs: English intermediate-task training, zero-shot transfer to XTREME and XTREME-R, and their official scores."""
