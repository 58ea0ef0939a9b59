//! Which requests were applied already: the memory behind "at most once by request id". Pure.

use std::{
    collections::{BTreeMap, VecDeque},
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
    /// Requests at the most, running ones included. At the limit the oldest finished one is forgotten.
    pub requests: usize,
    /// Bytes of answers at the most. At the limit the oldest answer goes; its request is still known as applied.
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
    /// As many requests are running as may be remembered.
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

/// Remembers requests; `R` is whatever others need to wait for a running one.
pub struct RequestIds<R> {
    limits: RequestLimits,
    entries: BTreeMap<RequestKey, Entry<R>>,
    /// Finished requests, oldest first.
    finished: VecDeque<(Moment, RequestKey)>,
    /// Those of them whose answer was kept, oldest first.
    answered: VecDeque<RequestKey>,
    answer_bytes: usize,
}

impl<R: Clone> RequestIds<R> {
    /// An empty memory.
    pub fn new(limits: RequestLimits) -> Self {
        Self { limits, entries: BTreeMap::new(), finished: VecDeque::new(), answered: VecDeque::new(), answer_bytes: 0 }
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
            if !self.forget_oldest() {
                return Admission::Full;
            }
        }
        self.entries.insert(key.clone(), Entry::Running(run));
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
                return;
            }
            Ending::Applied => None,
            Ending::Answered(answer) => Some(answer).filter(|answer| answer.body.len() <= self.limits.answer_bytes),
        };
        if let Some(answer) = &answer {
            self.answer_bytes += answer.body.len();
            self.answered.push_back(key.clone());
        }
        self.entries.insert(key.clone(), Entry::Finished(answer));
        self.finished.push_back((now, key.clone()));
        while self.answer_bytes > self.limits.answer_bytes {
            let oldest = self.answered.pop_front().expect("bytes belong to remembered answers");
            self.drop_answer(&oldest);
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

    fn forget_old(&mut self, now: Moment) {
        while self.finished.front().is_some_and(|(at, _)| now.since(*at) >= self.limits.life) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) -> bool {
        let Some((_, key)) = self.finished.pop_front() else { return false };
        // Answers are kept in the order in which requests finish.
        if self.answered.front() == Some(&key) {
            self.answered.pop_front();
        }
        self.drop_answer(&key);
        self.entries.remove(&key);
        true
    }

    fn drop_answer(&mut self, key: &RequestKey) {
        if let Some(Entry::Finished(answer)) = self.entries.get_mut(key)
            && let Some(answer) = answer.take()
        {
            self.answer_bytes -= answer.body.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Body;

    const LIMITS: RequestLimits = RequestLimits { requests: 3, answer_bytes: 100, life: Duration::from_secs(600) };

    fn key(id: u128) -> RequestKey {
        RequestKey { peer: PeerId::from_bytes(&[0, 1, 7]).unwrap(), id: RequestId(id), uid: "e.0".to_owned() }
    }

    fn answer(bytes: usize) -> Answer {
        Answer { body: Body::Message(vec![7; bytes].into()), load: None }
    }

    fn at(seconds: u64) -> Moment {
        Moment::START + Duration::from_secs(seconds)
    }

    fn finished(ids: &mut RequestIds<&'static str>, id: u128, seconds: u64, ending: Ending) {
        assert_eq!(ids.admit(at(seconds), &key(id), "run"), Admission::Run);
        ids.finish(at(seconds), &key(id), ending);
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
}
