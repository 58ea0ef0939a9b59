//! [`Probe`]: an actor that a test holds in its hand.

use std::{
    collections::VecDeque,
    fmt::Debug,
    sync::{Arc, Mutex},
    time::Duration,
};

use actix::{Actor, Addr, Context, Handler, Message};
use skep_kernel::{Deadline, Inbox, SharedClock, time::before};
use tokio::sync::Notify;

use crate::Sim;

/// Messages that may wait in a probe; more are an error of the test.
const CAPACITY: usize = 4096;

/// What a probe is told: a message of the actor under test.
struct Told<M> {
    messages: Mutex<VecDeque<M>>,
    news: Notify,
}

/// Stands for an actor that others talk to, and says what it was told. It takes any message type: as an actix actor
/// through [`addr`](Self::addr), or at the end of an [`Inbox`] through [`read`](Self::read). Waits are in virtual
/// time.
///
/// ```
/// use std::time::Duration;
/// use actix::Message;
/// use skep_testkit::Sim;
///
/// #[derive(Debug, PartialEq)]
/// struct Ping(u32);
/// impl Message for Ping {
///     type Result = ();
/// }
///
/// Sim::with_seed(1).run(|sim| async move {
///     let probe = sim.probe::<Ping>();
///     let addr = probe.addr();
///     addr.try_send(Ping(1)).unwrap();
///     addr.try_send(Ping(7)).unwrap();
///     assert_eq!(probe.expect().await, Ping(1));
///     assert_eq!(probe.fish(|ping| ping.0 > 5).await, Ping(7));
///     probe.expect_none(Duration::from_secs(60)).await;
/// });
/// ```
pub struct Probe<M> {
    clock: SharedClock,
    told: Arc<Told<M>>,
    patience: Duration,
}

impl<M> Clone for Probe<M> {
    fn clone(&self) -> Self {
        Self { clock: self.clock.clone(), told: self.told.clone(), patience: self.patience }
    }
}

impl Sim {
    /// A probe that waits up to 3 s for what it expects.
    pub fn probe<M: Debug + Send + 'static>(&self) -> Probe<M> {
        let told = Told { messages: Mutex::default(), news: Notify::new() };
        Probe { clock: self.clock(), told: Arc::new(told), patience: Duration::from_secs(3) }
    }
}

impl<M: Debug + Send + 'static> Probe<M> {
    /// The same probe with another patience.
    pub fn within(&self, patience: Duration) -> Self {
        Self { patience, ..self.clone() }
    }

    /// Tells the probe something by hand: from a closure, a service, a callback.
    ///
    /// # Panics
    /// When 4096 messages wait already.
    pub fn tell(&self, message: M) {
        let mut messages = self.told.messages.lock().expect("nothing panics while it holds the messages");
        assert!(messages.len() < CAPACITY, "a probe holds {CAPACITY} messages; the test reads too few");
        messages.push_back(message);
        drop(messages);
        self.told.news.notify_one();
    }

    /// The next message.
    ///
    /// # Panics
    /// When none comes within the patience.
    pub async fn expect(&self) -> M {
        match self.next(self.patience).await {
            Some(message) => message,
            None => panic!("a probe was told nothing within {:?}", self.patience),
        }
    }

    /// The next message that is wanted; those before it are forgotten.
    ///
    /// # Panics
    /// When none comes within the patience; the message lists what came instead.
    pub async fn fish(&self, wanted: impl Fn(&M) -> bool) -> M {
        let deadline = Deadline::after(self.clock.now(), self.patience);
        let mut others = Vec::new();
        while let Some(message) = self.next(deadline.remaining(self.clock.now())).await {
            if wanted(&message) {
                return message;
            }
            others.push(message);
        }
        panic!("a probe was not told what it fished for within {:?}, but {others:?}", self.patience)
    }

    /// Nothing comes for so long.
    ///
    /// # Panics
    /// When something comes.
    pub async fn expect_none(&self, time: Duration) {
        if let Some(message) = self.next(time).await {
            panic!("a probe was told {message:?}, where nothing was expected for {time:?}");
        }
    }

    /// An actor ends within the patience.
    ///
    /// # Panics
    /// When it does not.
    pub async fn expect_terminated<A: Actor>(&self, actor: &Addr<A>) {
        let deadline = Deadline::after(self.clock.now(), self.patience);
        let mut step = Duration::from_millis(1);
        while actor.connected() {
            let now = self.clock.now();
            assert!(!deadline.has_passed(now), "an actor still lives after {:?}", self.patience);
            self.clock.sleep_until((now + step).min(deadline.moment())).await;
            step *= 2;
        }
    }

    async fn next(&self, patience: Duration) -> Option<M> {
        let deadline = Deadline::after(self.clock.now(), patience);
        let next = async {
            loop {
                let next = self.told.messages.lock().expect("nothing panics while it holds the messages").pop_front();
                match next {
                    Some(message) => return message,
                    None => self.told.news.notified().await,
                }
            }
        };
        before(&*self.clock, deadline, next).await.ok()
    }

    /// Reads an inbox into the probe until the inbox is closed: the future is for a spawner, in the place of the actor
    /// whose inbox it is.
    pub fn read(&self, inbox: Inbox<M>) -> impl Future<Output = ()> + Send + 'static {
        let probe = self.clone();
        async move {
            while let Some(message) = inbox.next().await {
                probe.tell(message);
            }
        }
    }
}

impl<M: Message<Result = ()> + Debug + Send + 'static> Probe<M> {
    /// An actix actor in whose place the probe stands; it ends when nobody has its address any more.
    pub fn addr(&self) -> Addr<ProbeActor<M>> {
        ProbeActor { probe: self.clone() }.start()
    }
}

/// The actor in whose place a [`Probe`] stands.
///
/// ```
/// use actix::{Addr, Message};
/// use skep_testkit::{ProbeActor, Sim};
///
/// #[derive(Debug, PartialEq)]
/// struct Ping;
/// impl Message for Ping {
///     type Result = ();
/// }
///
/// Sim::with_seed(1).run(|sim| async move {
///     let probe = sim.probe::<Ping>();
///     let listener: Addr<ProbeActor<Ping>> = probe.addr();
///     listener.recipient().try_send(Ping).unwrap();
///     assert_eq!(probe.expect().await, Ping);
/// });
/// ```
pub struct ProbeActor<M> {
    probe: Probe<M>,
}

impl<M: Debug + Send + 'static> Actor for ProbeActor<M> {
    type Context = Context<Self>;
}

impl<M: Message<Result = ()> + Debug + Send + 'static> Handler<M> for ProbeActor<M> {
    type Result = ();

    fn handle(&mut self, message: M, _ctx: &mut Context<Self>) {
        self.probe.tell(message);
    }
}
