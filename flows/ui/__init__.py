"""The flows that the Prefect UI starts: the form behind `compress`, and reruns when constraints change."""
