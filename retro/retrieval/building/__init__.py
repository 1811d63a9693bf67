"""Documents to stores: the tasks of a build, who does them, and the updates of a store that is there."""
