"""The report page, its plots, the versions a run was made with."""
