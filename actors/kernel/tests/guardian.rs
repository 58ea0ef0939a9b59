//! Actors that end in every way there is, and what their guardian does about it.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use actix::{Actor, ActorContext, Context, Handler};
use skep_kernel::{
    ChildSpec, Deadline, Exit, Guardian, GuardianHandle, GuardianSpec, Inbox, Intensity, Restart, Seed, SharedClock,
    Started, Stop, Strategy, TokioClock, Tombstone,
    guardian::{ChildState, ChildStatus, GuardianStatus, StillRunning, SuperviseError},
    pump,
};

const SECOND: Duration = Duration::from_secs(1);

/// Runs a test on an actix system whose time is virtual.
fn system(test: impl Future<Output = ()>) {
    let runtime =
        || tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().expect("a runtime");
    actix_rt::System::with_tokio_rt(runtime).block_on(test);
}

fn clock() -> SharedClock {
    Arc::new(TokioClock::system())
}

fn guardian(strategy: Strategy, clock: &SharedClock) -> GuardianHandle {
    Guardian::start(spec("test", strategy), clock.clone())
}

fn spec(name: &str, strategy: Strategy) -> GuardianSpec {
    GuardianSpec { name: name.into(), strategy, intensity: Intensity::default(), seed: Seed::new(1) }
}

#[derive(Debug)]
enum Order {
    Panic,
    PanicWhenDropped,
    PanicWhenStopped,
    Finish,
    Fail,
    Note(u32),
}

/// What the test sees of an actor: its inbox and its diary, which outlive it.
#[derive(Clone)]
struct Post {
    name: &'static str,
    inbox: Inbox<Order>,
    diary: Arc<Mutex<Vec<String>>>,
}

impl Post {
    fn note(&self, word: impl std::fmt::Display) {
        self.diary.lock().unwrap().push(format!("{} {word}", self.name));
    }

    fn tell(&self, order: Order) {
        self.inbox.tell(order).unwrap();
    }
}

struct Worker {
    post: Post,
    panic_when_dropped: bool,
    panic_when_stopped: bool,
    tombstone: Tombstone,
}

impl Actor for Worker {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.post.note("starts");
        pump(ctx, self.post.inbox.clone(), Worker::obey);
    }

    fn stopped(&mut self, _ctx: &mut Self::Context) {
        if self.panic_when_stopped {
            panic!("told to");
        }
        self.post.note("stops");
    }
}

impl Worker {
    fn obey(&mut self, order: Order, ctx: &mut Context<Self>) {
        match order {
            Order::Panic => panic!("told to"),
            Order::PanicWhenDropped => {
                self.panic_when_dropped = true;
                ctx.stop();
            }
            Order::PanicWhenStopped => {
                self.panic_when_stopped = true;
                ctx.stop();
            }
            Order::Finish => {
                self.tombstone.write(Exit::Finished);
                ctx.stop();
            }
            Order::Fail => {
                self.tombstone.write(Exit::Failed("told to".into()));
                ctx.stop();
            }
            Order::Note(number) => self.post.note(number),
        }
    }
}

impl Handler<Stop> for Worker {
    type Result = ();

    fn handle(&mut self, _: Stop, ctx: &mut Self::Context) {
        ctx.stop();
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if self.panic_when_dropped {
            panic!("told to");
        }
    }
}

fn post(name: &'static str, diary: &Arc<Mutex<Vec<String>>>) -> Post {
    Post { name, inbox: Inbox::bounded(16), diary: diary.clone() }
}

fn worker(post: &Post) -> impl FnMut(Tombstone) -> Started + Send + 'static {
    let post = post.clone();
    move |tombstone| {
        let worker = Worker { post: post.clone(), panic_when_dropped: false, panic_when_stopped: false, tombstone };
        Started::actor(worker.start())
    }
}

async fn hire(guardian: &GuardianHandle, post: &Post, restart: Restart) {
    guardian.supervise(ChildSpec::new(post.name, restart), worker(post)).await.unwrap();
}

async fn until(guardian: &GuardianHandle, mut met: impl FnMut(&GuardianStatus) -> bool) -> GuardianStatus {
    guardian.watch().until(|status| met(status).then(|| status.clone())).await
}

fn only(status: &GuardianStatus) -> ChildStatus {
    assert_eq!(status.children.len(), 1);
    status.children[0].clone()
}

fn entries(diary: &Arc<Mutex<Vec<String>>>) -> Vec<String> {
    std::mem::take(&mut diary.lock().unwrap())
}

/// Lets every task that can run do so; no time passes that a timer would notice.
async fn settle() {
    pass(Duration::from_millis(1)).await;
}

async fn pass(time: Duration) {
    let clock = clock();
    clock.sleep_until(clock.now() + time).await;
}

fn soon(clock: &SharedClock) -> Deadline {
    Deadline::after(clock.now(), SECOND)
}

#[test]
fn a_child_is_started_again_after_any_kind_of_panic() {
    for (order, exits) in [
        (Order::Panic, vec![Exit::Panicked]),
        (Order::PanicWhenStopped, vec![Exit::Panicked]),
        (Order::PanicWhenDropped, vec![Exit::Panicked]),
        (Order::Fail, vec![Exit::Failed("told to".into())]),
    ] {
        system(async move {
            let (clock, diary) = (clock(), Arc::default());
            let guardian = guardian(Strategy::OneForOne, &clock);
            let post = post("worker", &diary);
            hire(&guardian, &post, Restart::Transient).await;
            post.tell(order);
            let status = until(&guardian, |status| only(status).state != ChildState::Running).await;
            assert!(matches!(only(&status).state, ChildState::Backoff { until } if until > clock.now()));
            assert!(exits.contains(&only(&status).last_exit.unwrap()));
            until(&guardian, |status| only(status).state == ChildState::Running && only(status).restarts == 1).await;
            post.tell(Order::Note(7));
            settle().await;
            assert!(entries(&diary).ends_with(&["worker starts".into(), "worker 7".into()]));
        });
    }
}

#[test]
fn a_panic_anywhere_leaves_the_neighbours_alone() {
    for order in [Order::Panic, Order::PanicWhenStopped, Order::PanicWhenDropped] {
        system(async move {
            let (clock, diary) = (clock(), Arc::default());
            let guardian = guardian(Strategy::OneForOne, &clock);
            let (guilty, neighbour) = (post("guilty", &diary), post("neighbour", &diary));
            hire(&guardian, &guilty, Restart::Transient).await;
            hire(&guardian, &neighbour, Restart::Transient).await;
            guilty.tell(order);
            neighbour.tell(Order::Note(1));
            let status = until(&guardian, |status| status.children[0].restarts == 1).await;
            neighbour.tell(Order::Note(2));
            settle().await;
            assert_eq!((status.children[1].restarts, status.children[1].state), (0, ChildState::Running));
            let its_life: Vec<String> = entries(&diary).into_iter().filter(|e| e.starts_with("neighbour")).collect();
            assert_eq!(its_life, ["neighbour starts", "neighbour 1", "neighbour 2"]);
        });
    }
}

#[test]
fn a_panic_loses_the_message_at_hand_and_no_other() {
    system(async {
        let (clock, diary) = (clock(), Arc::default());
        let guardian = guardian(Strategy::OneForOne, &clock);
        let post = post("worker", &diary);
        hire(&guardian, &post, Restart::Permanent).await;
        for order in [Order::Note(1), Order::Panic, Order::Note(2), Order::Finish, Order::Note(3)] {
            post.tell(order);
        }
        until(&guardian, |status| only(status).state == ChildState::Running && only(status).restarts == 2).await;
        settle().await;
        let life = entries(&diary);
        let notes: Vec<_> =
            life.iter().filter(|entry| !entry.ends_with("starts") && !entry.ends_with("stops")).collect();
        assert_eq!(notes, ["worker 1", "worker 2", "worker 3"]);
    });
}

#[test]
fn a_panic_in_started_or_in_the_factory_counts_like_any_other() {
    struct StillBorn(#[expect(dead_code, reason = "it reports when dropped")] Tombstone);
    impl Actor for StillBorn {
        type Context = Context<Self>;
        fn started(&mut self, _: &mut Self::Context) {
            panic!("told to");
        }
    }
    impl Handler<Stop> for StillBorn {
        type Result = ();
        fn handle(&mut self, _: Stop, ctx: &mut Self::Context) {
            ctx.stop();
        }
    }
    system(async {
        let (clock, diary) = (clock(), Arc::default());
        let guardian = guardian(Strategy::OneForOne, &clock);
        let post = post("worker", &diary);
        let (mut starts, mut healthy) = (0, worker(&post));
        let factory = move |tombstone| {
            starts += 1;
            match starts {
                1 => panic!("told to"),
                2 => Started::actor(StillBorn(tombstone).start()),
                _ => healthy(tombstone),
            }
        };
        guardian.supervise(ChildSpec::new("worker", Restart::Transient), factory).await.unwrap();
        let status = until(&guardian, |status| only(status).restarts == 2).await;
        assert_eq!(only(&status).last_exit, Some(Exit::Panicked));
        until(&guardian, |status| only(status).state == ChildState::Running).await;
        settle().await;
        assert_eq!(entries(&diary), ["worker starts"]);
    });
}

#[test]
fn a_child_that_is_done_stays_away() {
    system(async {
        let (clock, diary) = (clock(), Arc::default());
        let guardian = guardian(Strategy::OneForOne, &clock);
        let (transient, temporary) = (post("transient", &diary), post("temporary", &diary));
        hire(&guardian, &transient, Restart::Transient).await;
        hire(&guardian, &temporary, Restart::Temporary).await;
        transient.tell(Order::Finish);
        temporary.tell(Order::Panic);
        let status = until(&guardian, |status| status.children.len() == 1).await;
        assert_eq!(only(&status).name, "transient");
        let status = until(&guardian, |status| only(status).state == ChildState::Stopped).await;
        assert_eq!(only(&status).last_exit, Some(Exit::Finished));
        pass(60 * SECOND).await;
        assert_eq!(guardian.status(), status);

        hire(&guardian, &transient, Restart::Transient).await;
        let again = guardian.supervise(ChildSpec::new("transient", Restart::Transient), worker(&transient)).await;
        assert!(matches!(again, Err(SuperviseError::NameTaken { name, .. }) if name == "transient"));
    });
}

#[test]
fn a_crash_loop_escalates_and_takes_the_guardian_down() {
    system(async {
        let (clock, diary) = (clock(), Arc::default());
        let guardian = guardian(Strategy::OneForOne, &clock);
        let (good, bad) = (post("good", &diary), post("bad", &diary));
        hire(&guardian, &good, Restart::Permanent).await;
        hire(&guardian, &bad, Restart::Permanent).await;
        for _ in 0..6 {
            bad.tell(Order::Panic);
        }
        let start = clock.now();
        let escalation = guardian.escalated().await.expect("the sixth crash is too much");
        assert_eq!((escalation.guardian.as_str(), escalation.child.as_str()), ("test", "bad"));
        assert!(clock.now() - start < 13 * SECOND, "0.4 + 0.8 + 1.6 + 3.2 + 6.4 s at most");
        let status = until(&guardian, |status| status.ended).await;
        let states: Vec<_> = status.children.iter().map(|child| child.state).collect();
        assert_eq!(states, [ChildState::Stopped, ChildState::Escalated]);
        assert_eq!(entries(&diary).last().unwrap(), "good stops");
        let late = guardian.supervise(ChildSpec::new("late", Restart::Permanent), worker(&good)).await;
        assert_eq!(late, Err(SuperviseError::Ended));
    });
}

#[test]
fn rest_for_one_takes_those_behind_along() {
    system(async {
        let (clock, diary) = (clock(), Arc::default());
        let guardian = guardian(Strategy::RestForOne, &clock);
        let posts = ["net", "dht", "announcer"].map(|name| post(name, &diary));
        for post in &posts {
            hire(&guardian, post, Restart::Permanent).await;
        }
        settle().await;
        assert_eq!(entries(&diary), ["net starts", "dht starts", "announcer starts"]);
        posts[1].tell(Order::Fail);
        let status = until(&guardian, |status| status.children[2].state == ChildState::Waiting).await;
        assert!(matches!(status.children[1].state, ChildState::Backoff { .. }));
        assert_eq!(status.children[0].state, ChildState::Running);
        settle().await;
        assert_eq!(entries(&diary), ["dht stops", "announcer stops"]);
        let late = post("late", &diary);
        hire(&guardian, &late, Restart::Permanent).await;
        until(&guardian, |status| status.children.iter().all(|child| child.state == ChildState::Running)).await;
        settle().await;
        assert_eq!(entries(&diary), ["dht starts", "announcer starts", "late starts"]);
        let restarts: Vec<_> = guardian.status().children.iter().map(|child| child.restarts).collect();
        assert_eq!(restarts, [0, 1, 0, 0]);
    });
}

#[test]
fn children_stop_in_reverse_order() {
    system(async {
        let (clock, diary) = (clock(), Arc::default());
        let guardian = guardian(Strategy::OneForOne, &clock);
        let posts = ["first", "second", "third"].map(|name| post(name, &diary));
        for post in &posts {
            hire(&guardian, post, Restart::Permanent).await;
        }
        settle().await;
        entries(&diary);
        assert_eq!(guardian.stop(soon(&clock)).await, Ok(()));
        assert_eq!(entries(&diary), ["third stops", "second stops", "first stops"]);
        assert!(guardian.status().ended);
        assert_eq!(guardian.escalated().await, None);
        assert_eq!(guardian.stop(soon(&clock)).await, Ok(()), "once more is no error");
    });
}

#[test]
fn a_child_that_does_not_stop_is_named_at_the_deadline() {
    system(async {
        let (clock, diary) = (clock(), Arc::default());
        let guardian = guardian(Strategy::OneForOne, &clock);
        let good = post("good", &diary);
        hire(&guardian, &good, Restart::Permanent).await;
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let stubborn = move |tombstone| {
            let count = count.clone();
            Started::new(move || {
                let _kept = &tombstone;
                count.fetch_add(1, Ordering::Relaxed);
            })
        };
        guardian.supervise(ChildSpec::new("stubborn", Restart::Permanent), stubborn).await.unwrap();
        let start = clock.now();
        let (stopped, meanwhile) = tokio::join!(guardian.stop(soon(&clock)), guardian.stop(soon(&clock)));
        assert_eq!(clock.now() - start, SECOND);
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        assert!(matches!(&stopped, Err(StillRunning(names)) if names.contains(&"stubborn".to_string())));
        let afterwards = guardian.stop(soon(&clock)).await;
        assert_eq!((&meanwhile, &afterwards), (&stopped, &stopped), "whoever asks again hears the same");
        settle().await;
        assert_eq!(entries(&diary).last().unwrap(), "good stops", "it was asked all the same");
    });
}

#[test]
fn a_guardian_whose_handles_are_gone_stops_its_children() {
    system(async {
        let (clock, diary) = (clock(), Arc::default());
        let guardian = guardian(Strategy::OneForOne, &clock);
        hire(&guardian, &post("orphan", &diary), Restart::Permanent).await;
        settle().await;
        drop(guardian);
        settle().await;
        assert_eq!(entries(&diary), ["orphan starts", "orphan stops"]);
    });
}

#[test]
fn a_guardian_can_be_a_child_and_its_escalation_a_failure() {
    system(async {
        let (clock, diary) = (clock(), Arc::default());
        let root = guardian(Strategy::RestForOne, &clock);
        let post = post("expert", &diary);
        let (hired, below_clock) = (post.clone(), clock.clone());
        let below = move |tombstone| {
            let strict = GuardianSpec {
                intensity: Intensity { restarts: 0, within: SECOND },
                ..spec("server", Strategy::OneForOne)
            };
            let handle = Guardian::start_under(strict, below_clock.clone(), tombstone);
            let (server, post) = (handle.clone(), hired.clone());
            actix_rt::spawn(async move { hire(&server, &post, Restart::Permanent).await });
            Started::guardian(handle)
        };
        root.supervise(ChildSpec::new("server", Restart::Permanent), below).await.unwrap();
        post.tell(Order::Panic);
        let status = until(&root, |status| only(status).restarts == 1).await;
        assert!(matches!(only(&status).last_exit, Some(Exit::Failed(why)) if why.contains("expert")));
        until(&root, |status| only(status).state == ChildState::Running).await;
        settle().await;
        entries(&diary);
        assert_eq!(root.stop(soon(&clock)).await, Ok(()));
        assert_eq!(entries(&diary), ["expert stops"]);
    });
}

#[test]
fn handles_work_from_any_thread() {
    fn any_thread<T: Send + Sync>() {}
    any_thread::<GuardianHandle>();
}
