//! Records of the DHT, for programs that keep more than experts in it.

use std::time::Duration;

use skep_dht::{DhtKey, Freshness, StoreItem, Stored, Timed};

use super::Runtime;
use crate::error::Error;

impl Runtime {
    /// What is stored under a key, looked for in the whole network: the latest there is. Blocks.
    pub fn get_record(&self, key: DhtKey, wait: Duration) -> Result<Option<Timed<Stored>>, Error> {
        let deadline = self.shared.client.deadline(wait);
        let dht = self.shared.client.dht.clone();
        self.block(deadline, async move {
            let found = dht.get_many(vec![key], Freshness::Latest, deadline).await?;
            Ok(found.into_iter().next().flatten())
        })
    }

    /// Stores an item at the nodes nearest to its key and tells whether one of them took it. They refuse what does not
    /// expire later than what is there, and what is not signed by its owner. Blocks.
    pub fn store_record(&self, item: StoreItem, wait: Duration) -> Result<bool, Error> {
        let deadline = self.shared.client.deadline(wait);
        let dht = self.shared.client.dht.clone();
        self.block(deadline, async move { Ok(dht.store_many(vec![item], deadline).await? == [true]) })
    }

    /// Looks for a key that nobody has, which drops dead nodes from the routing table and fills it with living ones. Goes
    /// on in the background.
    #[cfg(feature = "daemon")]
    pub(crate) fn refresh_table(&self) {
        let client = &self.shared.client;
        let deadline = client.deadline(Duration::from_secs(30));
        let (dht, key) = (client.dht.clone(), DhtKey::of_bytes(&skep_kernel::Seed::random().number().to_be_bytes()));
        client.spawner.spawn(async move {
            // Only its course counts: nothing is stored there.
            let _absent = dht.get_many(vec![key], Freshness::Latest, deadline).await;
        });
    }
}
