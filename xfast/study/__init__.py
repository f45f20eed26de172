"""The study: throughput, latency and accuracy per language, and the figures about real text it is built on."""
