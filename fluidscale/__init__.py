"""How one run of the scaling-law laboratory is computed: knows neither where it runs nor what it means."""
