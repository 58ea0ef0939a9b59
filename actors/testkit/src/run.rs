//! [`Setup`]: how a simulation is run, over which seeds, for how long, and what counts as a failure of it.

use std::{env, panic::resume_unwind, time::Duration};

use skep_kernel::Moment;

use crate::{
    Sim,
    logs::Logs,
    quiet::describe,
    report::report,
    watch::Watch,
    world::{Failed, Failure, World},
};

/// Virtual time that a test may take.
const TIME_LIMIT: Duration = Duration::from_secs(24 * 3600);
/// Virtual time for stopping everything after the test.
const AFTERMATH: Duration = Duration::from_secs(300);

/// What lives outside of all nodes and was started behind the simulation's back.
const UNNAMED: &str =
    "an actor or a task that the test started outside of all nodes; Sim::start_actor and Sim::spawner say where";

/// A simulation about to start. From [`Sim::with_seed`].
///
/// ```
/// use std::time::Duration;
/// use skep_testkit::{Setup, Sim};
///
/// let setup: Setup = Sim::with_seed(7).time_limit(Duration::from_secs(60));
/// let seed = setup.run(|sim| async move { sim.seed() });
/// assert!(seed == 7 || std::env::var_os("SKEP_SEED").is_some());
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    seed: u64,
    allow_leaks: bool,
    time_limit: Duration,
}

impl Setup {
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, allow_leaks: false, time_limit: TIME_LIMIT }
    }

    /// Lets actors, tasks, timers and calls be left at the end.
    pub fn allow_leaks(self) -> Self {
        Self { allow_leaks: true, ..self }
    }

    /// Virtual time after which the test fails; a day unless set.
    pub fn time_limit(self, time_limit: Duration) -> Self {
        Self { time_limit, ..self }
    }

    /// Runs `test` on a fresh actix system whose time stands still while anything can run, and jumps to the next timer
    /// when nothing can. Afterwards every node is stopped and nothing may be left (see [`Sim::assert_quiet`]).
    ///
    /// The environment may name another seed, `SKEP_SEED=48879` or `SKEP_SEED=0xbeef`, or ask for so many seeds from this
    /// one on, `SKEP_SEEDS=1000`: then `test` is called once for each, and the last result is returned.
    ///
    /// # Panics
    /// When `test` panics, when it leaves something behind, when its time is over or nothing can run any more, and when
    /// its thread waited for real time (noticed on Linux from 100 ms on: a sleeping thread, a blocking call, a real
    /// socket). Seed, virtual time, last events and a line to replay it go to stderr first.
    pub fn run<R, F: Future<Output = R>>(self, test: impl Fn(Sim) -> F) -> R {
        let (last, others) = self.seeds();
        for seed in others {
            self.run_seed(seed, &test);
        }
        self.run_seed(last, &test)
    }

    /// The seeds to run: the last one, and those before it.
    fn seeds(&self) -> (u64, Vec<u64>) {
        let seed = env::var("SKEP_SEED").ok().map_or(self.seed, |text| number("SKEP_SEED", &text));
        let count = env::var("SKEP_SEEDS").ok().map_or(1, |text| number("SKEP_SEEDS", &text)).max(1);
        let nth = |n| seed.wrapping_add(n);
        (nth(count - 1), (0..count - 1).map(nth).collect())
    }

    fn run_seed<R, F: Future<Output = R>>(self, seed: u64, test: impl Fn(Sim) -> F) -> R {
        let system = actix_rt::System::with_tokio_rt(|| {
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            runtime.enable_all().start_paused(true).build().expect("a runtime needs no more than a few descriptors")
        });
        system.block_on(async move {
            let mut world = World::new(Sim::fresh_clock());
            let sim = Sim::new(seed, world.clock(), world.test().clone());
            let _logs = Logs::collect(&sim);
            let outcome = self.live(&mut world, &sim, test).await;
            let waited = Watch::end();
            let waited = waited.map(|(node, time)| waited_in_real_time(node, time));
            match outcome {
                Ok(result) => {
                    if let Some(waited) = waited {
                        eprintln!("{}", report(&sim));
                        panic!("{waited}");
                    }
                    result
                }
                Err(failed) => {
                    eprintln!("{}", failed.report);
                    if let Some(waited) = waited {
                        eprintln!("{waited}");
                    }
                    match failed.why {
                        Failure::Panic(panic) => resume_unwind(panic),
                        Failure::TimeIsOver { last_ran } => panic!("{}", time_is_over(&sim, last_ran, &failed.waits)),
                        Failure::Left(left) => panic!("{}", describe(&left)),
                    }
                }
            }
        })
    }

    /// The test and what comes after it.
    async fn live<R, F: Future<Output = R>>(
        self,
        world: &mut World,
        sim: &Sim,
        test: impl Fn(Sim) -> F,
    ) -> Result<R, Failed> {
        let result = world.run(sim, || test(sim.clone()), Moment::START + self.time_limit).await?;
        if self.allow_leaks {
            return Ok(result);
        }
        let limit = sim.now() + AFTERMATH;
        let mut left = world.run(sim, || sim.settle(), limit).await?;
        if world.test_is_busy().await && sim.tasks().is_empty() && sim.actors().is_empty() {
            left.push(UNNAMED.to_owned());
        }
        if left.is_empty() { Ok(result) } else { Err(Failed::now(sim, Failure::Left(left))) }
    }
}

fn number(name: &str, text: &str) -> u64 {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => text.parse(),
    };
    number.unwrap_or_else(|error| panic!("{name}={text} is no number: {error}"))
}

fn time_is_over(sim: &Sim, last_ran: Moment, waits: &[String]) -> String {
    let now = sim.now();
    let mut text = if now - last_ran > Duration::from_secs(3600) {
        format!("deadlock: since {last_ran:?} nothing could run and no timer was set, but the test is not done;")
    } else {
        format!("the test is not done after {:?} of virtual time;", now - Moment::START)
    };
    match waits.is_empty() {
        true => {
            text += " no call is under way: it waits for a message, a notification or a lock of this process, or for a real \
                     socket or another thread, for which virtual time does not wait";
        }
        false => waits.iter().for_each(|wait| text += &format!("\n  {wait}")),
    }
    text
}

fn waited_in_real_time(node: u32, time: Duration) -> String {
    let who = if node == 0 { "the test".to_owned() } else { format!("node {node}") };
    format!(
        "{who} waited {time:?} of real time: a sleeping thread, a blocking call or a real socket inside a simulation; \
         wait on Sim::clock, and keep what blocks out of it"
    )
}
