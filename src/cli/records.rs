//! `skep dht get|store|keys`: records of the DHT.

use std::path::PathBuf;

use bytes::Bytes;
use clap::Args;
use serde_json::{Value as Json, json};
use skep_dht::{DhtKey, RecordKey, StoreItem, Stored, Timed, Validators};
use skep_kernel::WallTime;
use skep_net::identity;
use skep_wire::msgpack::{self, Value};

use super::{Failure, peer::Peer, wait::Waiting};
use crate::{Runtime, error::Error};

/// Options of `skep dht get`.
#[derive(Debug, Args)]
#[command(
    rename_all = "snake_case",
    after_help = "Examples:\n  skep dht get expert.1 --peer ADDR\n  skep dht get scores --subkey 3 --peer ADDR --json"
)]
pub struct Get {
    /// The key, a text
    key: String,
    /// Only this entry of a dictionary: JSON, or a text
    #[arg(long, value_name = "VALUE")]
    subkey: Option<String>,
    #[command(flatten)]
    peer: Peer,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Options of `skep dht keys`.
#[derive(Debug, Args)]
#[command(
    rename_all = "snake_case",
    after_help = "Examples:\n  skep dht keys expert.1. --peer ADDR\n\n\
                  Nodes cannot be asked for all their keys; these are the subkeys of one dictionary."
)]
pub struct Keys {
    /// The key of the dictionary, a text
    key: String,
    #[command(flatten)]
    peer: Peer,
    /// Print a JSON array
    #[arg(long)]
    json: bool,
}

/// Options of `skep dht store`.
#[derive(Debug, Args)]
#[command(
    rename_all = "snake_case",
    after_help = "Examples:\n  skep dht store greeting hello --peer ADDR\n  \
                  skep dht store scores 0.97 --subkey alice --sign alice.key --expiration 3600 --peer ADDR"
)]
pub struct Store {
    /// The key, a text
    key: String,
    /// The value: JSON, or a text
    value: String,
    /// Make it an entry of a dictionary: JSON, or a text
    #[arg(long, value_name = "VALUE")]
    subkey: Option<String>,
    /// Seconds for which it holds
    #[arg(long, default_value_t = 60.0, value_name = "SECONDS")]
    expiration: f64,
    /// An RSA key file (skep identity new FILE --type rsa): only its holder can change the entry
    #[arg(long, value_name = "FILE")]
    sign: Option<PathBuf>,
    #[command(flatten)]
    peer: Peer,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Get {
    pub fn run(self) -> Result<(), Failure> {
        let runtime = self.peer.join()?;
        let found = find(&runtime, &self.key, &self.peer)?;
        let nothing = || Failure::from(Error::NoSuchRecord { key: self.key.clone() });
        let found = found.ok_or_else(nothing)?;
        let now = runtime.wall();
        let found = match &self.subkey {
            None => found,
            Some(text) => {
                let item = entries(found).remove(&msgpack::serialize(&value(text))).ok_or_else(nothing)?;
                Timed { value: Stored::Regular(item.value), expiration: item.expiration }
            }
        };
        match found.value {
            Stored::Regular(bytes) if self.json => {
                println!("{:#}", json!({"value": shown(&bytes), "expires_in": found.expiration.0 - now.0}));
            }
            Stored::Regular(bytes) => println!("{}\t{}", shown(&bytes), left(found.expiration, now)),
            Stored::Dictionary(items) => {
                let entry = |(subkey, item): (&Bytes, &Timed<Bytes>)| json!({"subkey": shown(subkey), "value": shown(&item.value), "expires_in": item.expiration.0 - now.0});
                if self.json {
                    let entries: Vec<Json> = items.iter().map(entry).collect();
                    println!("{:#}", json!({"entries": entries, "expires_in": found.expiration.0 - now.0}));
                } else {
                    for (subkey, item) in &items {
                        println!("{}\t{}\t{}", shown(subkey), shown(&item.value), left(item.expiration, now));
                    }
                }
            }
        }
        Ok(())
    }
}

impl Keys {
    pub fn run(self) -> Result<(), Failure> {
        let runtime = self.peer.join()?;
        let found = find(&runtime, &self.key, &self.peer)?;
        let found = found.ok_or_else(|| Error::NoSuchRecord { key: self.key.clone() })?;
        let subkeys: Vec<Json> = entries(found).keys().map(shown).collect();
        if self.json {
            println!("{:#}", Json::from(subkeys));
        } else {
            subkeys.iter().for_each(|subkey| println!("{subkey}"));
        }
        Ok(())
    }
}

impl Store {
    pub fn run(self) -> Result<(), Failure> {
        if !(self.expiration > 0.0 && self.expiration.is_finite()) {
            return Err(Failure::Usage(format!("--expiration {}: give a number of seconds above 0", self.expiration)));
        }
        let key = self.sign.as_deref().map(record_key).transpose()?;
        let subkey = match &key {
            // Bytes, as hivemind's own examples have it: the name, then the marker of its owner.
            Some(key) => {
                let name = self.subkey.as_deref().unwrap_or_default();
                Some(Value::Bin([name.as_bytes(), &key.owner_marker()].concat().into()))
            }
            None => self.subkey.as_deref().map(value),
        };
        let runtime = match key {
            Some(key) => self.peer.join_as(|builder| builder.validators(Validators::signing(key)))?,
            None => self.peer.join()?,
        };
        let item = StoreItem {
            key: DhtKey::of_text(&self.key),
            subkey: subkey.as_ref().map(msgpack::serialize),
            value: msgpack::serialize(&value(&self.value)),
            expiration: runtime.wall() + self.expiration,
        };
        let expiration = item.expiration;
        let waiting = Waiting::on(format!("storing {}", self.key));
        let stored = runtime.store_record(item, self.peer.timeout()?)?;
        drop(waiting);
        if !stored {
            return Err(Error::NotStored { key: self.key }.into());
        }
        if self.json {
            let subkey = subkey.as_ref().map(show);
            println!("{:#}", json!({"key": self.key, "subkey": subkey, "expiration": expiration.0}));
        } else {
            println!("stored {} for {} s", self.key, self.expiration);
        }
        Ok(())
    }
}

fn find(runtime: &Runtime, key: &str, peer: &Peer) -> Result<Option<Timed<Stored>>, Failure> {
    let _waiting = Waiting::on(format!("looking for {key}"));
    Ok(runtime.get_record(DhtKey::of_text(key), peer.timeout()?)?)
}

fn entries(found: Timed<Stored>) -> std::collections::BTreeMap<Bytes, Timed<Bytes>> {
    match found.value {
        Stored::Dictionary(items) => items,
        Stored::Regular(_) => Default::default(),
    }
}

fn record_key(path: &std::path::Path) -> Result<RecordKey, Failure> {
    let identity = identity::load(path).map_err(Error::from)?;
    let key = identity.rsa_pkcs1_der().map(|der| RecordKey::from_pkcs1_der(&der));
    match key {
        Some(Ok(key)) => Ok(key),
        Some(Err(error)) => Err(Failure::Usage(format!("--sign {}: {error}", path.display()))),
        None => Err(Failure::Usage(format!(
            "--sign {}: records are signed with RSA keys; make one: skep identity new FILE --type rsa",
            path.display()
        ))),
    }
}

fn left(expiration: WallTime, now: WallTime) -> String {
    format!("expires in {:.0} s", expiration.0 - now.0)
}

/// What a word of the command line stands for: JSON where it is some, else a text.
fn value(text: &str) -> Value {
    serde_json::from_str(text).map_or_else(|_| Value::from(text), |json: Json| from_json(&json))
}

fn from_json(json: &Json) -> Value {
    match json {
        Json::Null => Value::Nil,
        Json::Bool(flag) => Value::Bool(*flag),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(small), _) => Value::Int(small),
            (None, Some(large)) => Value::UInt(large),
            (None, None) => Value::F64(number.as_f64().expect("a JSON number is an integer or a float")),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => Value::List(items.iter().map(from_json).collect()),
        Json::Object(items) => {
            Value::Map(items.iter().map(|(key, item)| (Value::from(key.as_str()), from_json(item))).collect())
        }
    }
}

/// Serialized bytes as JSON.
fn shown(bytes: &Bytes) -> Json {
    msgpack::deserialize(bytes).map_or_else(|_| Json::from(format!("0x{bytes:x}")), |value| show(&value))
}

/// Tuples become arrays; bytes become text where they are some, else hexadecimal digits.
fn show(value: &Value) -> Json {
    match value {
        Value::Nil => Json::Null,
        Value::Bool(flag) => (*flag).into(),
        Value::Int(number) => (*number).into(),
        Value::UInt(number) => (*number).into(),
        Value::F64(number) => (*number).into(),
        Value::Str(text) => text.as_str().into(),
        Value::Bin(bytes) => std::str::from_utf8(bytes).map_or_else(|_| format!("0x{bytes:x}").into(), Json::from),
        Value::List(items) | Value::Tuple(items) => items.iter().map(show).collect(),
        Value::Map(items) => items.iter().map(|(key, item)| (name(key), show(item))).collect(),
        Value::Ext(code, bytes) => json!({"extension": code, "bytes": format!("0x{bytes:x}")}),
    }
}

fn name(key: &Value) -> String {
    match show(key) {
        Json::String(text) => text,
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_json_where_they_can_be() {
        assert_eq!(value("5"), Value::Int(5));
        assert_eq!(value("\"5\""), Value::from("5"));
        assert_eq!(value("hello"), Value::from("hello"));
        assert_eq!(value("[1, null]"), Value::List(vec![Value::Int(1), Value::Nil]));
        assert_eq!(value("18446744073709551615"), Value::UInt(u64::MAX));
        assert_eq!(value("{\"a\": 0.5}"), Value::Map(vec![(Value::from("a"), Value::F64(0.5))]));
    }

    #[test]
    fn what_is_shown_is_json_whatever_is_stored() {
        let tuple = Value::Tuple(vec![Value::from("e.1.2"), Value::Bin(Bytes::from_static(b"\xff"))]);
        assert_eq!(shown(&msgpack::serialize(&tuple)), json!(["e.1.2", "0xff"]));
        assert_eq!(shown(&Bytes::from_static(b"\xc1")), json!("0xc1"));
        assert_eq!(show(&Value::F64(f64::NAN)), Json::Null);
    }
}
