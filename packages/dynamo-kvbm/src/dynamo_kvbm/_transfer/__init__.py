"""Moving block bytes: where they lie in memory, copies between layouts, and the engine that runs copies."""
