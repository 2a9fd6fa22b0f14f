"""Five plug-ins, one a module. Nothing here is imported until a name is asked for."""
