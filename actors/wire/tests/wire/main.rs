//! The wire as Python hivemind 1.1.12 writes it, and what skep does with bytes that it would never write.

mod chunks;
mod compression;
mod dht_values;
mod frames;
mod hostile;
mod messages;
mod msgpack;
mod native;
mod schemas;
mod support;
