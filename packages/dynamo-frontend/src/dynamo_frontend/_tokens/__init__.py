"""APIs in token ids: text to ids and back, and generation that takes and gives ids."""
