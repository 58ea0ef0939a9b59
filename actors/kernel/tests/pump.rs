//! An actor and its inbox.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use actix::{Actor, ActorContext, AsyncContext, Context, WrapFuture};
use skep_kernel::{Clock, Inbox, TokioClock, Tombstone, pump};
use tokio::sync::oneshot;

struct Slow {
    inbox: Inbox<u32>,
    handled: Arc<Mutex<Vec<u32>>>,
    clock: TokioClock,
    _tombstone: Tombstone,
}

impl Actor for Slow {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        pump(ctx, self.inbox.clone(), Slow::handle);
    }
}

impl Slow {
    /// Takes a second for each message and stops at zero.
    fn handle(&mut self, message: u32, ctx: &mut Context<Self>) {
        if message == 0 {
            ctx.stop();
        }
        let (handled, clock) = (self.handled.clone(), self.clock.clone());
        let work = async move {
            clock.sleep_until(clock.now() + Duration::from_secs(1)).await;
            handled.lock().unwrap().push(message);
        };
        ctx.wait(work.into_actor(self));
    }
}

struct Life {
    inbox: Inbox<u32>,
    handled: Arc<Mutex<Vec<u32>>>,
    ended: oneshot::Receiver<()>,
}

fn start(clock: &TokioClock) -> Life {
    let (inbox, handled) = (Inbox::bounded(8), Arc::default());
    let (over, ended) = oneshot::channel();
    let over = Mutex::new(Some(over));
    let tombstone = Tombstone::new(move |_| drop(over.lock().unwrap().take()));
    let slow =
        Slow { inbox: inbox.clone(), handled: Arc::clone(&handled), clock: clock.clone(), _tombstone: tombstone };
    let _addr = slow.start();
    Life { inbox, handled, ended }
}

fn system(test: impl Future<Output = ()>) {
    let runtime =
        || tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().expect("a runtime");
    actix_rt::System::with_tokio_rt(runtime).block_on(test);
}

#[test]
fn messages_wait_while_one_is_worked_on() {
    system(async {
        let clock = TokioClock::system();
        let life = start(&clock);
        (1..=3).for_each(|message| life.inbox.tell(message).unwrap());
        clock.sleep_until(clock.now() + Duration::from_millis(1500)).await;
        assert_eq!(*life.handled.lock().unwrap(), [1]);
        assert_eq!(life.inbox.len(), 1, "the second is being worked on, the third is in line");
    });
}

#[test]
fn an_actor_that_stops_leaves_the_line_to_its_successor() {
    system(async {
        let clock = TokioClock::system();
        let life = start(&clock);
        [0, 1].into_iter().for_each(|message| life.inbox.tell(message).unwrap());
        assert!(life.ended.await.is_err());
        assert_eq!(life.inbox.next().await, Some(1));
    });
}

#[test]
fn a_closed_inbox_stops_its_actor_once_it_is_empty() {
    system(async {
        let clock = TokioClock::system();
        let life = start(&clock);
        [1, 2].into_iter().for_each(|message| life.inbox.tell(message).unwrap());
        life.inbox.close();
        assert!(life.ended.await.is_err());
        assert_eq!(*life.handled.lock().unwrap(), [1, 2]);
    });
}
