"""Configurations shipped with the package, used by name: `jaxlora train --config tiny`."""
