"""The network: encoder, mixers, decoder."""
