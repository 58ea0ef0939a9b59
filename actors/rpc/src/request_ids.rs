//! Which requests were applied already: the memory behind "at most once by request id". Pure.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use libp2p_identity::PeerId;
use skep_kernel::Moment;

use crate::{Answer, RequestId};

/// A logical request: ids of different callers, or for different experts, never meet.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RequestKey {
    /// The authenticated caller.
    pub peer: PeerId,
    /// The id that the caller keeps when it tries again.
    pub id: RequestId,
    /// The expert asked.
    pub uid: String,
}

/// How much is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestLimits {
    /// Requests at the most, running ones included. At the limit the oldest finished one of the peer that has most is
    /// forgotten.
    pub requests: usize,
    /// Bytes of answers at the most. At the limit the oldest answer of the peer with most bytes goes; its request is still
    /// known as applied.
    pub answer_bytes: usize,
    /// How long a finished request is remembered.
    pub life: Duration,
}

/// What to do with a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Admission<R> {
    /// It is new: run it, then say how it ended by [`RequestIds::finish`].
    Run,
    /// It is running: wait for that.
    Join(R),
    /// It was applied: this was the answer.
    Answered(Answer),
    /// It was applied, and its answer is no longer remembered.
    AlreadyApplied,
    /// As many requests are running as may be remembered, or all room is taken by peers that have less than this one.
    Full,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq)]
pub enum Ending {
    /// Applied, with this answer.
    Answered(Answer),
    /// Applied, but there is no answer that could be repeated.
    Applied,
    /// Nothing was changed: the same id may run again.
    NotApplied,
}

enum Entry<R> {
    Running(R),
    Finished(Option<Answer>),
}

/// What is remembered of one peer.
#[derive(Default)]
struct Share {
    /// Requests, running ones included.
    requests: usize,
    /// Numbers of the finished ones, oldest first.
    finished: VecDeque<u64>,
    /// Those of them whose answer was kept, oldest first.
    answered: VecDeque<u64>,
    answer_bytes: usize,
}

/// Remembers requests; `R` is whatever others need to wait for a running one.
///
/// Peers share the room: at a limit those go that belong to the peer which takes most, so that whoever floods a server
/// makes it forget its own requests and nobody else's.
pub struct RequestIds<R> {
    limits: RequestLimits,
    entries: BTreeMap<RequestKey, Entry<R>>,
    /// Finished requests by a number that grows, so oldest first.
    finished: BTreeMap<u64, (Moment, RequestKey)>,
    next: u64,
    shares: BTreeMap<PeerId, Share>,
    /// Peers of which a request is finished, by all their requests.
    by_requests: BTreeSet<(usize, PeerId)>,
    /// Peers of which an answer is kept, by the bytes of their answers.
    by_answer_bytes: BTreeSet<(usize, PeerId)>,
    answer_bytes: usize,
}

impl<R: Clone> RequestIds<R> {
    /// An empty memory.
    pub fn new(limits: RequestLimits) -> Self {
        Self {
            limits,
            entries: BTreeMap::new(),
            finished: BTreeMap::new(),
            next: 0,
            shares: BTreeMap::new(),
            by_requests: BTreeSet::new(),
            by_answer_bytes: BTreeSet::new(),
            answer_bytes: 0,
        }
    }

    /// Looks a request up, and notes it as running under `run` if it is new.
    pub fn admit(&mut self, now: Moment, key: &RequestKey, run: R) -> Admission<R> {
        self.forget_old(now);
        match self.entries.get(key) {
            Some(Entry::Running(run)) => return Admission::Join(run.clone()),
            Some(Entry::Finished(Some(answer))) => return Admission::Answered(answer.clone()),
            Some(Entry::Finished(None)) => return Admission::AlreadyApplied,
            None => {}
        }
        while self.entries.len() >= self.limits.requests {
            let Some(number) = self.dispensable(key.peer) else { return Admission::Full };
            self.forget(number);
        }
        self.entries.insert(key.clone(), Entry::Running(run));
        self.change(key.peer, |share| share.requests += 1);
        Admission::Run
    }

    /// Notes how a running request ended.
    pub fn finish(&mut self, now: Moment, key: &RequestKey, ending: Ending) {
        if !matches!(self.entries.get(key), Some(Entry::Running(_))) {
            return;
        }
        let answer = match ending {
            Ending::NotApplied => {
                self.entries.remove(key);
                self.change(key.peer, |share| share.requests -= 1);
                return;
            }
            Ending::Applied => None,
            Ending::Answered(answer) => Some(answer).filter(|answer| answer.body.len() <= self.limits.answer_bytes),
        };
        let number = self.next;
        self.next += 1;
        self.finished.insert(number, (now, key.clone()));
        let answer_bytes = answer.as_ref().map(|answer| answer.body.len());
        self.entries.insert(key.clone(), Entry::Finished(answer));
        self.answer_bytes += answer_bytes.unwrap_or(0);
        self.change(key.peer, |share| {
            share.finished.push_back(number);
            if let Some(bytes) = answer_bytes {
                share.answered.push_back(number);
                share.answer_bytes += bytes;
            }
        });
        while self.answer_bytes > self.limits.answer_bytes {
            let (_, peer) = self.by_answer_bytes.last().copied().expect("bytes belong to kept answers");
            let oldest = self.shares.get(&peer).and_then(|share| share.answered.front().copied());
            self.drop_answer(oldest.expect("a peer with bytes has an answer"));
        }
    }

    /// Requests that are remembered.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The finished request that goes for a new one of `peer`: the oldest one of the peer that has most, of `peer` itself
    /// if it would have as many. `None` when that leaves nobody: a peer never takes from those who have less.
    fn dispensable(&self, peer: PeerId) -> Option<u64> {
        let own = self.shares.get(&peer);
        let own_requests = own.map_or(0, |share| share.requests);
        let own_oldest = own.and_then(|share| share.finished.front().copied());
        match (self.by_requests.last(), own_oldest) {
            (Some((most, other)), None) if *most > own_requests => self.shares.get(other)?.finished.front().copied(),
            (Some((most, other)), Some(_)) if *most > own_requests + 1 => {
                self.shares.get(other)?.finished.front().copied()
            }
            (_, own_oldest) => own_oldest,
        }
    }

    fn forget_old(&mut self, now: Moment) {
        while let Some((number, (at, _))) = self.finished.first_key_value()
            && now.since(*at) >= self.limits.life
        {
            self.forget(*number);
        }
    }

    /// Forgets a finished request, the oldest one of its peer.
    fn forget(&mut self, number: u64) {
        self.drop_answer(number);
        let Some((_, key)) = self.finished.remove(&number) else { return };
        self.entries.remove(&key);
        self.change(key.peer, |share| {
            share.finished.pop_front();
            share.requests -= 1;
        });
    }

    /// Forgets the answer of a request, if it was kept: the oldest one of its peer.
    fn drop_answer(&mut self, number: u64) {
        let Some((_, key)) = self.finished.get(&number) else { return };
        let Some(Entry::Finished(kept)) = self.entries.get_mut(key) else { return };
        let Some(answer) = kept.take() else { return };
        let (peer, bytes) = (key.peer, answer.body.len());
        self.answer_bytes -= bytes;
        self.change(peer, |share| {
            share.answered.pop_front();
            share.answer_bytes -= bytes;
        });
    }

    /// Changes a peer's share, and its places among the others with it.
    fn change(&mut self, peer: PeerId, act: impl FnOnce(&mut Share)) {
        let share = self.shares.entry(peer).or_default();
        self.by_requests.remove(&(share.requests, peer));
        self.by_answer_bytes.remove(&(share.answer_bytes, peer));
        act(share);
        if !share.finished.is_empty() {
            self.by_requests.insert((share.requests, peer));
        }
        if !share.answered.is_empty() {
            self.by_answer_bytes.insert((share.answer_bytes, peer));
        }
        if share.requests == 0 {
            self.shares.remove(&peer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Body;

    const LIMITS: RequestLimits = RequestLimits { requests: 3, answer_bytes: 100, life: Duration::from_secs(600) };

    fn key(id: u128) -> RequestKey {
        key_of(7, id)
    }

    fn key_of(peer: u8, id: u128) -> RequestKey {
        RequestKey { peer: PeerId::from_bytes(&[0, 1, peer]).unwrap(), id: RequestId(id), uid: "e.0".to_owned() }
    }

    fn answer(bytes: usize) -> Answer {
        Answer { body: Body::Message(vec![7; bytes].into()), load: None }
    }

    fn at(seconds: u64) -> Moment {
        Moment::START + Duration::from_secs(seconds)
    }

    fn finished(ids: &mut RequestIds<&'static str>, id: u128, seconds: u64, ending: Ending) {
        finished_by(ids, &key(id), seconds, ending);
    }

    fn finished_by(ids: &mut RequestIds<&'static str>, key: &RequestKey, seconds: u64, ending: Ending) {
        assert_eq!(ids.admit(at(seconds), key, "run"), Admission::Run);
        ids.finish(at(seconds), key, ending);
    }

    #[test]
    fn a_repeat_joins_the_running_one_and_then_gets_its_answer() {
        let mut ids = RequestIds::new(LIMITS);
        assert_eq!(ids.admit(at(0), &key(1), "first"), Admission::Run);
        assert_eq!(ids.admit(at(1), &key(1), "second"), Admission::Join("first"));
        ids.finish(at(2), &key(1), Ending::Answered(answer(9)));
        assert_eq!(ids.admit(at(3), &key(1), "third"), Admission::Answered(answer(9)));
        let other = RequestKey { uid: "e.1".to_owned(), ..key(1) };
        assert_eq!(ids.admit(at(3), &other, "other"), Admission::Run);
    }

    #[test]
    fn what_was_not_applied_may_run_again() {
        let mut ids = RequestIds::new(LIMITS);
        finished(&mut ids, 1, 0, Ending::NotApplied);
        assert!(ids.is_empty());
        finished(&mut ids, 1, 0, Ending::Applied);
        assert_eq!(ids.admit(at(1), &key(1), "again"), Admission::AlreadyApplied);
    }

    #[test]
    fn requests_are_forgotten_after_their_life() {
        let mut ids = RequestIds::new(LIMITS);
        finished(&mut ids, 1, 0, Ending::Answered(answer(9)));
        assert_eq!(ids.admit(at(599), &key(1), "again"), Admission::Answered(answer(9)));
        assert_eq!(ids.admit(at(600), &key(1), "again"), Admission::Run);
        assert_eq!(ids.answer_bytes, 0);
    }

    #[test]
    fn the_oldest_answers_go_first_but_their_requests_stay_applied() {
        let mut ids = RequestIds::new(LIMITS);
        finished(&mut ids, 1, 0, Ending::Answered(answer(60)));
        finished(&mut ids, 2, 1, Ending::Answered(answer(60)));
        finished(&mut ids, 3, 1, Ending::Answered(answer(101)));
        assert_eq!(ids.admit(at(2), &key(1), "again"), Admission::AlreadyApplied);
        assert_eq!(ids.admit(at(2), &key(2), "again"), Admission::Answered(answer(60)));
        assert_eq!(ids.admit(at(2), &key(3), "again"), Admission::AlreadyApplied);
    }

    #[test]
    fn the_memory_is_bounded_and_running_requests_are_never_forgotten() {
        let mut ids = RequestIds::new(LIMITS);
        assert_eq!(ids.admit(at(0), &key(1), "run"), Admission::Run);
        finished(&mut ids, 2, 0, Ending::Answered(answer(60)));
        finished(&mut ids, 3, 1, Ending::Applied);
        assert_eq!(ids.admit(at(2), &key(4), "run"), Admission::Run);
        assert_eq!(ids.admit(at(2), &key(5), "run"), Admission::Run);
        assert_eq!((ids.len(), ids.answer_bytes), (3, 0));
        assert_eq!(ids.admit(at(2), &key(6), "run"), Admission::Full);
        assert_eq!(ids.admit(at(2), &key(1), "again"), Admission::Join("run"));
    }
    const SHARED: RequestLimits = RequestLimits { requests: 10, answer_bytes: 100, life: Duration::from_secs(600) };

    #[test]
    fn a_peer_that_floods_makes_its_own_requests_forgotten_and_nobody_elses() {
        let mut ids = RequestIds::new(SHARED);
        let kept: Vec<RequestKey> = (0..3).map(|id| key_of(1, id)).collect();
        kept.iter().for_each(|key| finished_by(&mut ids, key, 0, Ending::Answered(answer(10))));
        for id in 0..1000 {
            finished_by(&mut ids, &key_of(2, id), 1, Ending::Answered(answer(10)));
            assert!(ids.len() <= 10 && ids.answer_bytes <= 100);
        }
        for key in &kept {
            assert_eq!(ids.admit(at(2), key, "again"), Admission::Answered(answer(10)));
        }
        // It keeps what room the others leave, the latest ones.
        assert_eq!(ids.admit(at(2), &key_of(2, 993), "again"), Admission::Answered(answer(10)));
        assert_eq!(ids.admit(at(2), &key_of(2, 992), "again"), Admission::Run);
    }

    #[test]
    fn a_newcomer_gets_room_from_whoever_has_most() {
        let mut ids = RequestIds::new(SHARED);
        (0..10).for_each(|id| finished_by(&mut ids, &key_of(1, id), 0, Ending::Answered(answer(10))));
        (0..5).for_each(|id| finished_by(&mut ids, &key_of(2, id), 1, Ending::Answered(answer(10))));
        assert_eq!(ids.admit(at(2), &key_of(1, 4), "again"), Admission::Run);
        // Half of the room is its own now; what it sends more takes no more from the other.
        (5..50).for_each(|id| finished_by(&mut ids, &key_of(2, id), 2, Ending::Answered(answer(10))));
        for id in 6..10 {
            assert_eq!(ids.admit(at(3), &key_of(1, id), "again"), Admission::Answered(answer(10)), "{id}");
        }
    }

    #[test]
    fn large_answers_of_one_peer_cost_no_answer_of_another() {
        let mut ids = RequestIds::new(SHARED);
        finished_by(&mut ids, &key_of(1, 0), 0, Ending::Answered(answer(30)));
        (0..4).for_each(|id| finished_by(&mut ids, &key_of(2, id), 1, Ending::Answered(answer(60))));
        assert_eq!(ids.admit(at(2), &key_of(1, 0), "again"), Admission::Answered(answer(30)));
        assert_eq!(ids.admit(at(2), &key_of(2, 2), "again"), Admission::AlreadyApplied);
        assert_eq!(ids.admit(at(2), &key_of(2, 3), "again"), Admission::Answered(answer(60)));
    }

    #[test]
    fn a_peer_whose_running_requests_fill_the_room_is_refused_and_takes_nothing_from_others() {
        let mut ids = RequestIds::new(SHARED);
        (0..3).for_each(|id| finished_by(&mut ids, &key_of(1, id), 0, Ending::Applied));
        let admitted = (0..100).filter(|id| ids.admit(at(1), &key_of(2, *id), "run") == Admission::Run).count();
        assert_eq!(admitted, 7);
        for id in 0..3 {
            assert_eq!(ids.admit(at(2), &key_of(1, id), "again"), Admission::AlreadyApplied);
        }
        // One of the others still has room made for it, of its own.
        assert_eq!(ids.admit(at(2), &key_of(1, 3), "run"), Admission::Run);
        assert_eq!(ids.admit(at(2), &key_of(1, 0), "again"), Admission::Run);
    }

    #[test]
    fn nothing_is_left_of_peers_whose_requests_are_forgotten() {
        let mut ids = RequestIds::new(SHARED);
        for peer in 0..50 {
            finished_by(&mut ids, &key_of(peer, 0), u64::from(peer), Ending::Answered(answer(30)));
            finished_by(&mut ids, &key_of(peer, 1), u64::from(peer), Ending::NotApplied);
        }
        assert_eq!(ids.admit(at(1000), &key(0), "run"), Admission::Run);
        ids.finish(at(1000), &key(0), Ending::NotApplied);
        assert!(ids.is_empty() && ids.finished.is_empty() && ids.shares.is_empty());
        assert!(ids.by_requests.is_empty() && ids.by_answer_bytes.is_empty() && ids.answer_bytes == 0);
    }
}
