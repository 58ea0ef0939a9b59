//! Records with an owner: whoever's key or subkey holds `[owner:ssh-rsa …]` must be signed with that key (docs/wire.md
//! §6.11, hivemind's `RSASignatureValidator`).

use std::{fmt, sync::Arc};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use rsa::{
    BigUint, Pss, RsaPrivateKey, RsaPublicKey,
    pkcs1::{DecodeRsaPrivateKey, EncodeRsaPrivateKey},
    rand_core::OsRng,
    sha2::{Digest, Sha256},
    traits::PublicKeyParts,
};
use skep_wire::msgpack::{self, Value};

use super::validate::{DhtRecord, RecordValidator};

const OWNER: &[u8] = b"[owner:";
const SIGNATURE: &[u8] = b"[signature:";
/// The only kind of key; also the name inside the OpenSSH form.
const KIND: &str = "ssh-rsa";
/// Bits of a key that skep makes, hivemind's.
const BITS: usize = 2048;
/// Bytes of SHA-256 and the two bytes that PSS adds: what a salt of maximum length leaves of the modulus.
const HASH_AND_PADDING: usize = 32 + 2;

/// The RSA key of an owner of records.
#[derive(Clone)]
pub struct RecordKey {
    key: Arc<RsaPrivateKey>,
    marker: Bytes,
}

/// A key that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no RSA key to sign records with: {0}")]
pub struct BadRecordKey(String);

impl fmt::Debug for RecordKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RecordKey({})", String::from_utf8_lossy(&self.marker))
    }
}

impl RecordKey {
    /// A new key of 2048 bits. Takes up to a second or so.
    pub fn generate() -> Result<Self, BadRecordKey> {
        RsaPrivateKey::new(&mut OsRng, BITS).map_err(|error| BadRecordKey(error.to_string())).and_then(Self::new)
    }

    /// Reads PKCS#1 DER, as hivemind's identity files hold it.
    pub fn from_pkcs1_der(der: &[u8]) -> Result<Self, BadRecordKey> {
        RsaPrivateKey::from_pkcs1_der(der).map_err(|error| BadRecordKey(error.to_string())).and_then(Self::new)
    }

    fn new(key: RsaPrivateKey) -> Result<Self, BadRecordKey> {
        if key.size() <= HASH_AND_PADDING {
            return Err(BadRecordKey(format!("{} bits are too few for a signature", key.n().bits())));
        }
        let marker = [OWNER, openssh(&key.to_public_key()).as_bytes(), b"]"].concat().into();
        Ok(Self { key: Arc::new(key), marker })
    }

    /// PKCS#1 DER.
    pub fn to_pkcs1_der(&self) -> Result<Vec<u8>, BadRecordKey> {
        let der = self.key.to_pkcs1_der().map_err(|error| BadRecordKey(error.to_string()))?;
        Ok(der.as_bytes().to_vec())
    }

    /// What a subkey contains to belong to this key: `[owner:ssh-rsa …]`.
    pub fn owner_marker(&self) -> Bytes {
        self.marker.clone()
    }

    fn sign(&self, message: &[u8]) -> Option<String> {
        let signature = self.key.sign_with_rng(&mut OsRng, padding(self.key.size())?, &Sha256::digest(message));
        Some(STANDARD.encode(signature.ok()?))
    }
}

/// Checks signatures, and signs what belongs to its key if it has one.
pub(crate) struct RsaSignatures(Option<RecordKey>);

impl RsaSignatures {
    pub fn checking() -> Self {
        Self(None)
    }

    pub fn signing(key: RecordKey) -> Self {
        Self(Some(key))
    }
}

impl RecordValidator for RsaSignatures {
    fn validate(&self, record: &DhtRecord) -> bool {
        let owners = owners(record);
        let Some(owner) = owners.first() else { return true };
        if owners.iter().any(|other| other != owner) {
            return false;
        }
        let [signature] = blocks(SIGNATURE, &record.value)[..] else { return false };
        let signature = STANDARD.decode(&record.value[signature.content()]);
        let message = message(record, strip(&record.value));
        public_key(owner).zip(signature.ok()).is_some_and(|(key, signature)| verifies(&key, &message, &signature))
    }

    fn sign(&self, record: &DhtRecord) -> Bytes {
        let Some(key) = &self.0 else { return record.value.clone() };
        let is_ours = [&record.key.0[..], &record.subkey].iter().any(|part| contains(part, &key.marker));
        let signature = if is_ours { key.sign(&message(record, record.value.clone())) } else { None };
        match signature {
            Some(signature) => [&record.value[..], SIGNATURE, signature.as_bytes(), b"]"].concat().into(),
            None => record.value.clone(),
        }
    }

    /// Values without an owner stay as they are, whatever text they hold.
    fn strip(&self, record: &DhtRecord) -> Bytes {
        if owners(record).is_empty() { record.value.clone() } else { strip(&record.value) }
    }

    fn is_costly(&self, record: &DhtRecord) -> bool {
        !owners(record).is_empty()
    }

    /// Before those who look into values.
    fn priority(&self) -> i32 {
        10
    }
}

/// A bracketed block within bytes.
#[derive(Clone, Copy)]
struct Block {
    from: usize,
    content: usize,
    /// The closing bracket.
    to: usize,
}

impl Block {
    fn content(&self) -> std::ops::Range<usize> {
        self.content..self.to
    }
}

/// Blocks as hivemind's regular expression `opening(.+?)\]` finds them: at least one byte, no line feed, up to the first
/// bracket after that.
fn blocks(opening: &[u8], bytes: &[u8]) -> Vec<Block> {
    let mut found = Vec::new();
    let mut from = 0;
    while let Some(start) = find(&bytes[from..], opening).map(|at| from + at) {
        let content = start + opening.len();
        let end = bytes.iter().enumerate().skip(content + 1).find(|(_, byte)| **byte == b']').map(|(at, _)| at);
        match end.filter(|end| !bytes[content..*end].contains(&b'\n')) {
            Some(to) => {
                found.push(Block { from: start, content, to });
                from = to + 1;
            }
            None => from = start + 1,
        }
    }
    found
}

fn find(bytes: &[u8], wanted: &[u8]) -> Option<usize> {
    bytes.windows(wanted.len()).position(|window| window == wanted)
}

fn contains(bytes: &[u8], wanted: &[u8]) -> bool {
    find(bytes, wanted).is_some()
}

/// The keys that a record names, from its key and its subkey.
fn owners(record: &DhtRecord) -> Vec<&[u8]> {
    let parts = [&record.key.0[..], &record.subkey[..]];
    parts.into_iter().flat_map(|part| blocks(OWNER, part).into_iter().map(|block| &part[block.content()])).collect()
}

fn strip(value: &Bytes) -> Bytes {
    let mut stripped = Vec::with_capacity(value.len());
    let mut from = 0;
    for block in blocks(SIGNATURE, value) {
        stripped.extend_from_slice(&value[from..block.from]);
        from = block.to + 1;
    }
    stripped.extend_from_slice(&value[from..]);
    stripped.into()
}

/// What is signed: the tuple of key, subkey, value without signature, expiration.
fn message(record: &DhtRecord, value: Bytes) -> Bytes {
    msgpack::serialize(&Value::Tuple(vec![
        Value::Bin(Bytes::copy_from_slice(&record.key.0)),
        Value::Bin(record.subkey.clone()),
        Value::Bin(value),
        Value::F64(record.expiration.0),
    ]))
}

/// PSS with SHA-256 and the longest salt that fits; nothing for keys that are too short.
fn padding(modulus_bytes: usize) -> Option<Pss> {
    modulus_bytes.checked_sub(HASH_AND_PADDING).map(Pss::new_with_salt::<Sha256>)
}

fn verifies(key: &RsaPublicKey, message: &[u8], signature: &[u8]) -> bool {
    let padding = padding(key.size());
    padding.is_some_and(|padding| key.verify(padding, &Sha256::digest(message), signature).is_ok())
}

/// A public key in OpenSSH's form, without a comment.
fn openssh(key: &RsaPublicKey) -> String {
    let mut blob = Vec::new();
    for field in [KIND.as_bytes().to_vec(), positive(key.e()), positive(key.n())] {
        let length = u32::try_from(field.len()).expect("a key has few bytes");
        blob.extend_from_slice(&length.to_be_bytes());
        blob.extend_from_slice(&field);
    }
    format!("{KIND} {}", STANDARD.encode(blob))
}

/// A number whose first bit is not taken for a sign.
fn positive(number: &BigUint) -> Vec<u8> {
    let mut bytes = number.to_bytes_be();
    if bytes.first().is_some_and(|first| first & 0x80 != 0) {
        bytes.insert(0, 0);
    }
    bytes
}

/// Reads OpenSSH's form; keys above 4096 bits are refused, as their arithmetic is slow.
fn public_key(text: &[u8]) -> Option<RsaPublicKey> {
    let text = std::str::from_utf8(text).ok()?;
    let (kind, rest) = text.split_once(' ')?;
    let blob = STANDARD.decode(rest.split(' ').next()?).ok()?;
    let mut fields = Vec::new();
    let mut left = &blob[..];
    while !left.is_empty() {
        let (length, rest) = left.split_first_chunk::<4>()?;
        let (field, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        fields.push(field);
        left = rest;
    }
    let [inner_kind, e, n] = fields[..] else { return None };
    if kind != KIND || inner_kind != KIND.as_bytes() {
        return None;
    }
    RsaPublicKey::new(BigUint::from_bytes_be(n), BigUint::from_bytes_be(e)).ok()
}

#[cfg(test)]
mod tests {
    use serde_json::Value as Json;
    use skep_kernel::WallTime;

    use super::*;
    use crate::{DhtId, Validators};

    fn vectors() -> Json {
        serde_json::from_str(include_str!("../../tests/vectors/identity_crypto.json")).unwrap()
    }

    fn bytes(json: &Json) -> Bytes {
        hex::decode(json.as_str().unwrap()).unwrap().into()
    }

    /// The record of a vector with one of its values.
    fn record(vector: &Json, value: &str) -> DhtRecord {
        DhtRecord {
            key: DhtId::from_slice(&bytes(&vector["key_hex"])).unwrap(),
            subkey: bytes(&vector["subkey_hex"]),
            value: bytes(&vector[value]),
            expiration: WallTime(vector["expiration"].as_f64().unwrap()),
        }
    }

    fn hiveminds_key() -> RecordKey {
        RecordKey::from_pkcs1_der(&bytes(&vectors()["rsa_private_key_pkcs1_der_hex"])).unwrap()
    }

    #[test]
    fn a_key_has_hiveminds_marker() {
        let (vectors, key) = (vectors(), hiveminds_key());
        let marker = String::from_utf8(key.owner_marker().to_vec()).unwrap();
        assert_eq!(marker, vectors["local_public_key_marker"].as_str().unwrap());
        assert_eq!(marker, format!("[owner:{}]", vectors["rsa_public_key_openssh"].as_str().unwrap()));
        assert_eq!(RecordKey::from_pkcs1_der(&key.to_pkcs1_der().unwrap()).unwrap().owner_marker(), key.owner_marker());
    }

    #[test]
    fn what_hivemind_signed_is_valid_and_stripped_as_there() {
        let checking = RsaSignatures::checking();
        for vector in vectors()["records"].as_array().unwrap() {
            let (unsigned, signed) = (record(vector, "value_hex"), record(vector, "signed_value_hex"));
            assert_eq!(message(&unsigned, unsigned.value.clone()), bytes(&vector["signed_message_hex"]));
            assert_eq!(checking.validate(&signed), vector["validates"].as_bool().unwrap(), "{vector:#}");
            assert_eq!(checking.validate(&unsigned), vector["unsigned_validates"].as_bool().unwrap(), "{vector:#}");
            assert_eq!(checking.strip(&signed), bytes(&vector["stripped_hex"]));
        }
    }

    #[test]
    fn what_we_sign_is_valid_until_anything_of_it_changes() {
        let signing = Validators::signing(hiveminds_key());
        for vector in vectors()["records"].as_array().unwrap() {
            let unsigned = record(vector, "value_hex");
            let signed = DhtRecord { value: signing.sign(&unsigned), ..unsigned.clone() };
            assert!(Validators::default().validate(&signed));
            assert_eq!(signing.strip(&signed), unsigned.value);
            if signed == unsigned {
                continue;
            }
            let later = DhtRecord { expiration: WallTime(signed.expiration.0 + 1.0), ..signed.clone() };
            let moved = DhtRecord { key: DhtId([7; 20]), ..signed.clone() };
            let mut value = signed.value.to_vec();
            value[0] ^= 1;
            let changed = DhtRecord { value: value.into(), ..signed.clone() };
            let twice = DhtRecord { value: [&signed.value[..], &signed.value[..]].concat().into(), ..signed };
            for forged in [later, moved, changed, twice] {
                assert!(!Validators::default().validate(&forged), "{forged:?}");
            }
        }
    }

    #[test]
    fn nobody_signs_for_another_owner() {
        let stranger = RsaSignatures::signing(RecordKey::generate().unwrap());
        let vectors = vectors();
        let unsigned = record(&vectors["records"][1], "value_hex");
        assert_eq!(stranger.sign(&unsigned), unsigned.value);
        assert!(!stranger.validate(&unsigned));
    }

    #[test]
    fn two_owners_are_as_bad_as_none_that_can_be_read() {
        let (first, second) = (hiveminds_key(), RecordKey::generate().unwrap());
        let subkeys: [Bytes; 4] = [
            [first.owner_marker(), second.owner_marker()].concat().into(),
            Bytes::from_static(b"[owner:ssh-rsa AAAA]"),
            Bytes::from_static(b"[owner:somebody]"),
            Bytes::from_static(b"[owner:]]"),
        ];
        for subkey in subkeys {
            let value = Bytes::from_static(b"\x01[signature:AAAA]");
            let record = DhtRecord { key: DhtId([0; 20]), subkey, value, expiration: WallTime(1.0) };
            assert!(!RsaSignatures::signing(first.clone()).validate(&record), "{record:?}");
        }
    }

    #[test]
    fn blocks_are_those_of_hiveminds_regular_expression() {
        let found = |text: &'static str| -> Vec<&str> {
            blocks(SIGNATURE, text.as_bytes()).iter().map(|block| &text[block.content()]).collect()
        };
        assert_eq!(found("a[signature:bc]d[signature:e]"), ["bc", "e"]);
        assert_eq!(found("[signature:]]"), ["]"]);
        assert_eq!(found("[signature:[signature:a]"), ["[signature:a"]);
        assert_eq!(found("[signature:a\nb][signature:c]"), ["c"]);
        assert!(found("[signature:open").is_empty() && found("[signature:").is_empty() && found("").is_empty());
    }
}
