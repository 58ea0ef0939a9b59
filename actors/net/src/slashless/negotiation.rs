//! How names without a leading slash pass through rust's multistream-select; no I/O (docs/wire.md §1.4,
//! docs/adr/0002-muxer-wrapper.md).
//!
//! hivemind's handler names are protocol ids without a leading slash, which rust's multistream-select refuses. So on our
//! side of a substream they carry the prefix `/hm/`, and on the wire they do not. A [`Negotiation`] sits between the
//! two, rewrites whole multistream messages until a name is agreed on, and then lets bytes through as they are.

/// What our side puts before a name that has no slash on the wire. The wire never carries it.
pub(crate) const PREFIX: &str = "/hm/";

const HEADER: &[u8] = b"/multistream/1.0.0\n";
const NOT_AVAILABLE: &[u8] = b"na\n";
const LIST: &[u8] = b"ls\n";
/// multistream-select's own limit: lengths of two varint bytes.
const MAX_MESSAGE: usize = (1 << 14) - 1;

/// Which end of the substream we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// We opened it and propose names.
    Dialer,
    /// The remote opened it; we accept or refuse names.
    Listener,
}

/// Bytes with which the substream must end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Violation {
    #[error("the remote used the reserved protocol name prefix {PREFIX}")]
    ReservedName,
    #[error("a protocol negotiation message is longer than {MAX_MESSAGE} bytes")]
    TooLong,
    #[error("a protocol negotiation message has an invalid length")]
    Length,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    /// No proposal is waiting for its answer.
    Open,
    /// This proposal, as our side spells it, waits for its answer.
    Asked(Vec<u8>),
    /// A name was agreed on: everything further is payload.
    Agreed,
}

/// The negotiation of one substream.
///
/// Memory: one message of at most 16 KiB each way, and what the caller feeds in one go; while [`holds_back`] is true it
/// should feed nothing more.
///
/// [`holds_back`]: Negotiation::holds_back
#[derive(Debug)]
pub(crate) struct Negotiation {
    role: Role,
    state: State,
    from_wire: Vec<u8>,
    from_us: Vec<u8>,
    to_us: Vec<u8>,
    to_wire: Vec<u8>,
}

impl Negotiation {
    pub(crate) fn new(role: Role) -> Self {
        Self {
            role,
            state: State::Open,
            from_wire: Vec::new(),
            from_us: Vec::new(),
            to_us: Vec::new(),
            to_wire: Vec::new(),
        }
    }

    /// Takes bytes that the remote sent.
    pub(crate) fn receive(&mut self, bytes: &[u8]) -> Result<(), Violation> {
        self.from_wire.extend_from_slice(bytes);
        self.advance_inwards()
    }

    /// Takes bytes that our side writes.
    pub(crate) fn send(&mut self, bytes: &[u8]) -> Result<(), Violation> {
        self.from_us.extend_from_slice(bytes);
        while self.state != State::Agreed {
            let Some(message) = take_message(&mut self.from_us)? else { break };
            self.on_our_message(message);
        }
        if self.state == State::Agreed {
            self.to_wire.append(&mut self.from_us);
        }
        // An answer of ours frees what was held back behind the question.
        self.advance_inwards()
    }

    /// Bytes for our side to read; take with [`read`](Self::read).
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> usize {
        let n = buffer.len().min(self.to_us.len());
        buffer[..n].copy_from_slice(&self.to_us[..n]);
        self.to_us.drain(..n);
        n
    }

    /// Bytes to put on the wire; acknowledge with [`sent`](Self::sent).
    pub(crate) fn to_wire(&self) -> &[u8] {
        &self.to_wire
    }

    /// The first `n` bytes of [`to_wire`](Self::to_wire) are on the wire.
    pub(crate) fn sent(&mut self, n: usize) {
        self.to_wire.drain(..n);
    }

    /// Whether further bytes of the remote would wait for an answer of ours.
    pub(crate) fn holds_back(&self) -> bool {
        self.role == Role::Listener && matches!(self.state, State::Asked(_))
    }

    /// Whether a name was agreed on.
    pub(crate) fn is_agreed(&self) -> bool {
        self.state == State::Agreed
    }

    /// Whether nothing is left to do: bytes may pass by from now on.
    pub(crate) fn is_finished(&self) -> bool {
        self.is_agreed() && self.to_us.is_empty() && self.to_wire.is_empty()
    }

    fn advance_inwards(&mut self) -> Result<(), Violation> {
        while self.state != State::Agreed && !self.holds_back() {
            let Some(message) = take_message(&mut self.from_wire)? else { return Ok(()) };
            match self.role {
                Role::Listener => self.on_question(message)?,
                Role::Dialer => self.on_answer(message)?,
            }
        }
        if self.state == State::Agreed {
            self.to_us.append(&mut self.from_wire);
        }
        Ok(())
    }

    /// The remote, a dialer, proposes a name or asks for the list.
    fn on_question(&mut self, message: Vec<u8>) -> Result<(), Violation> {
        refuse_reserved(&message)?;
        let ours = if is_name(&message) { spelled_by_us(&message) } else { message };
        put_message(&mut self.to_us, &ours);
        if is_name(&ours) || ours == LIST {
            self.state = State::Asked(ours);
        }
        Ok(())
    }

    /// The remote, a listener, answers a proposal of ours.
    fn on_answer(&mut self, message: Vec<u8>) -> Result<(), Violation> {
        refuse_reserved(&message)?;
        match &self.state {
            State::Asked(proposal) if spelled_on_wire(proposal) == message => {
                put_message(&mut self.to_us, proposal);
                self.state = State::Agreed;
            }
            // Refused, or nonsense that our side's multistream-select rejects.
            _ => {
                put_message(&mut self.to_us, &message);
                if message != HEADER {
                    self.state = State::Open;
                }
            }
        }
        Ok(())
    }

    fn on_our_message(&mut self, message: Vec<u8>) {
        let next = match (self.role, &self.state) {
            _ if message == HEADER => None,
            (Role::Dialer, _) => Some(State::Asked(message.clone())),
            (Role::Listener, State::Asked(proposal)) if *proposal == message => Some(State::Agreed),
            (Role::Listener, _) => Some(State::Open),
        };
        match &self.state {
            State::Asked(question) if self.role == Role::Listener && question == LIST => {
                put_message(&mut self.to_wire, &list_on_wire(&message));
            }
            _ => put_message(&mut self.to_wire, spelled_on_wire(&message)),
        }
        if let Some(next) = next {
            self.state = next;
        }
    }
}

fn is_name(message: &[u8]) -> bool {
    message.len() > 1 && message.ends_with(b"\n") && ![HEADER, NOT_AVAILABLE, LIST].contains(&message)
}

fn refuse_reserved(message: &[u8]) -> Result<(), Violation> {
    if message.starts_with(PREFIX.as_bytes()) { Err(Violation::ReservedName) } else { Ok(()) }
}

fn spelled_by_us(name: &[u8]) -> Vec<u8> {
    if name.starts_with(b"/") { name.to_vec() } else { [PREFIX.as_bytes(), name].concat() }
}

fn spelled_on_wire(name: &[u8]) -> &[u8] {
    name.strip_prefix(PREFIX.as_bytes()).unwrap_or(name)
}

/// The answer to `ls`: length-delimited names, then a line end.
fn list_on_wire(list: &[u8]) -> Vec<u8> {
    let (mut rest, mut out) = (list.to_vec(), Vec::new());
    while let Ok(Some(name)) = take_message(&mut rest) {
        put_message(&mut out, spelled_on_wire(&name));
    }
    out.extend_from_slice(&rest);
    out
}

fn take_message(buffer: &mut Vec<u8>) -> Result<Option<Vec<u8>>, Violation> {
    let (length, start) = match unsigned_varint::decode::usize(buffer) {
        Ok((length, rest)) => (length, buffer.len() - rest.len()),
        Err(unsigned_varint::decode::Error::Insufficient) if buffer.len() < 3 => return Ok(None),
        Err(unsigned_varint::decode::Error::Insufficient) => return Err(Violation::TooLong),
        Err(_) => return Err(Violation::Length),
    };
    if length > MAX_MESSAGE {
        return Err(Violation::TooLong);
    }
    if buffer.len() - start < length {
        return Ok(None);
    }
    let message = buffer[start..start + length].to_vec();
    buffer.drain(..start + length);
    Ok(Some(message))
}

fn put_message(out: &mut Vec<u8>, message: &[u8]) {
    let mut length = unsigned_varint::encode::usize_buffer();
    out.extend_from_slice(unsigned_varint::encode::usize(message.len(), &mut length));
    out.extend_from_slice(message);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn messages(names: &[&[u8]]) -> Vec<u8> {
        let mut out = Vec::new();
        names.iter().for_each(|name| put_message(&mut out, name));
        out
    }

    /// Cuts `bytes` at these places, whatever their order.
    fn pieces<'a>(bytes: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect()
    }

    fn read_all(negotiation: &mut Negotiation) -> Vec<u8> {
        let mut buffer = vec![0; 1 << 16];
        let n = negotiation.read(&mut buffer);
        buffer.truncate(n);
        buffer
    }

    /// multistream-select's listener that serves these names: answers whole messages, goes quiet once agreed.
    struct Listener {
        served: Vec<&'static [u8]>,
        read: Vec<u8>,
        agreed: Option<Vec<u8>>,
    }

    impl Listener {
        fn answers(&mut self, bytes: &[u8]) -> Vec<u8> {
            self.read.extend_from_slice(bytes);
            let mut out = Vec::new();
            while self.agreed.is_none() {
                let Ok(Some(message)) = take_message(&mut self.read) else { break };
                if message == LIST {
                    let list = [messages(&self.served), b"\n".to_vec()].concat();
                    put_message(&mut out, &list);
                } else if message == HEADER {
                    put_message(&mut out, HEADER);
                } else if self.served.contains(&message.as_slice()) {
                    put_message(&mut out, &message);
                    self.agreed = Some(message);
                } else {
                    put_message(&mut out, NOT_AVAILABLE);
                }
            }
            out
        }
    }

    proptest! {
        #[test]
        fn a_listener_agrees_however_the_bytes_are_split(
            cuts in prop::collection::vec(0usize..200, 0..12),
            reply_cuts in prop::collection::vec(0usize..40, 0..4),
            payload in prop::collection::vec(any::<u8>(), 0..80),
            refused_first in any::<bool>(),
            asks_list in any::<bool>(),
        ) {
            // A lazy Go dialer sends header, names and payload in one packet.
            let mut wire = messages(&[HEADER]);
            if asks_list { wire.extend(messages(&[LIST])) }
            if refused_first { wire.extend(messages(&[b"Unknown.rpc\n", b"/slashed/unknown\n"])) }
            wire.extend(messages(&[b"DHTProtocol.rpc_ping\n"]));
            wire.extend_from_slice(&payload);

            let mut ours = Listener { served: vec![b"/hm/DHTProtocol.rpc_ping\n", b"/ipfs/id/1.0.0\n"], read: vec![], agreed: None };
            let mut negotiation = Negotiation::new(Role::Listener);
            let mut sent = Vec::new();
            for piece in pieces(&wire, &cuts) {
                negotiation.receive(piece).unwrap();
                loop {
                    let bytes = read_all(&mut negotiation);
                    let answers = ours.answers(&bytes);
                    if bytes.is_empty() { break }
                    for part in pieces(&answers, &reply_cuts) { negotiation.send(part).unwrap() }
                    let n = negotiation.to_wire().len();
                    sent.extend_from_slice(negotiation.to_wire());
                    negotiation.sent(n);
                }
            }
            prop_assert_eq!(ours.agreed.as_deref(), Some(&b"/hm/DHTProtocol.rpc_ping\n"[..]));
            prop_assert_eq!(&ours.read, &payload);
            prop_assert!(negotiation.is_finished());

            let mut expected = messages(&[HEADER]);
            if asks_list {
                let list = [messages(&[b"DHTProtocol.rpc_ping\n", b"/ipfs/id/1.0.0\n"]), b"\n".to_vec()].concat();
                expected.extend(messages(&[&list]));
            }
            if refused_first { expected.extend(messages(&[NOT_AVAILABLE, NOT_AVAILABLE])) }
            expected.extend(messages(&[b"DHTProtocol.rpc_ping\n"]));
            prop_assert_eq!(sent, expected);
        }

        #[test]
        fn a_dialer_agrees_however_the_bytes_are_split(
            cuts in prop::collection::vec(0usize..200, 0..12),
            our_cuts in prop::collection::vec(0usize..60, 0..6),
            payload in prop::collection::vec(any::<u8>(), 0..80),
        ) {
            let mut negotiation = Negotiation::new(Role::Dialer);
            for part in pieces(&messages(&[HEADER, b"/hm/Nope.rpc\n"]), &our_cuts) { negotiation.send(part).unwrap() }
            let mut wire = negotiation.to_wire().to_vec();
            negotiation.sent(wire.len());
            for piece in pieces(&messages(&[HEADER, NOT_AVAILABLE]), &cuts) { negotiation.receive(piece).unwrap() }
            prop_assert_eq!(read_all(&mut negotiation), messages(&[HEADER, NOT_AVAILABLE]));

            for part in pieces(&messages(&[b"/hm/DHTProtocol.rpc_ping\n"]), &our_cuts) { negotiation.send(part).unwrap() }
            wire.extend_from_slice(negotiation.to_wire());
            prop_assert_eq!(wire, messages(&[HEADER, b"Nope.rpc\n", b"DHTProtocol.rpc_ping\n"]));
            let n = negotiation.to_wire().len();
            negotiation.sent(n);
            let answer = [messages(&[b"DHTProtocol.rpc_ping\n"]), payload.clone()].concat();
            for piece in pieces(&answer, &cuts) { negotiation.receive(piece).unwrap() }
            let expected = [messages(&[b"/hm/DHTProtocol.rpc_ping\n"]), payload].concat();
            prop_assert_eq!(read_all(&mut negotiation), expected);
            prop_assert!(negotiation.is_finished());
        }

        #[test]
        fn no_bytes_make_it_panic(
            role in prop_oneof![Just(Role::Dialer), Just(Role::Listener)],
            steps in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..40)), 0..20),
        ) {
            let mut negotiation = Negotiation::new(role);
            for (inwards, bytes) in steps {
                let result = if inwards { negotiation.receive(&bytes) } else { negotiation.send(&bytes) };
                if result.is_err() { return Ok(()) }
            }
        }
    }

    #[test]
    fn slashed_names_stay_as_they_are() {
        let mut negotiation = Negotiation::new(Role::Listener);
        negotiation.receive(&messages(&[HEADER, b"/ipfs/id/1.0.0\n"])).unwrap();
        assert_eq!(read_all(&mut negotiation), messages(&[HEADER, b"/ipfs/id/1.0.0\n"]));
    }

    #[test]
    fn a_remote_that_spells_our_prefix_is_refused() {
        let mut listener = Negotiation::new(Role::Listener);
        assert_eq!(listener.receive(&messages(&[HEADER, b"/hm/x\n"])), Err(Violation::ReservedName));
        let mut dialer = Negotiation::new(Role::Dialer);
        dialer.send(&messages(&[HEADER, b"/hm/x\n"])).unwrap();
        assert_eq!(dialer.receive(&messages(&[HEADER, b"/hm/x\n"])), Err(Violation::ReservedName));
    }

    #[test]
    fn payload_behind_a_question_waits_for_the_answer() {
        let mut negotiation = Negotiation::new(Role::Listener);
        negotiation.receive(&[messages(&[HEADER, b"a\n"]), b"payload".to_vec()].concat()).unwrap();
        assert_eq!(read_all(&mut negotiation), messages(&[HEADER, b"/hm/a\n"]));
        assert!(negotiation.holds_back());
        assert_eq!(read_all(&mut negotiation), b"");
        negotiation.send(&messages(&[HEADER, b"/hm/a\n"])).unwrap();
        assert_eq!(read_all(&mut negotiation), b"payload");
    }

    #[test]
    fn a_message_longer_than_any_name_ends_the_negotiation() {
        let mut negotiation = Negotiation::new(Role::Listener);
        assert_eq!(negotiation.receive(&[0xff, 0xff, 0x7f]), Err(Violation::TooLong));
        assert_eq!(Negotiation::new(Role::Dialer).receive(&[0xff; 4]), Err(Violation::TooLong));
    }
}
