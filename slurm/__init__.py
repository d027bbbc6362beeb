"""Where runs are computed: placement, submission, status."""
