"""From raw problems to packed batches: curation, gates, rendering, packing, batching."""
