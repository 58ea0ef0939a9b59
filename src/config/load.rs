//! Layers file, environment and flags, and says where a bad value came from.

use std::path::{Path, PathBuf};

use figment::{
    Figment, Metadata, Profile, Provider,
    providers::{Env, Format, Serialized, Toml},
    value::{Dict, Map},
};

use super::{Config, ConfigError, validate};

/// Settings given on the command line, by section and key.
#[derive(Clone, Debug, Default)]
pub struct Flags(pub Dict);

impl Provider for Flags {
    fn metadata(&self) -> Metadata {
        Metadata::named("command line")
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Map::from([(Profile::Default, self.0.clone())]))
    }
}

/// A configuration and where each of its values came from.
#[derive(Debug)]
pub struct Loaded {
    /// The values.
    pub config: Config,
    /// The file that was read, if one was.
    pub file: Option<PathBuf>,
    layers: Figment,
}

impl Loaded {
    /// Where the value at a dotted path came from, as in `skep.toml` or `environment variable SKEP_NODE__…`.
    pub fn origin(&self, path: &str) -> String {
        match self.layers.find_metadata(path) {
            Some(metadata) => metadata.name.to_string(),
            None => "default".to_owned(),
        }
    }
}

/// Reads and checks the configuration: defaults < `file` < environment (`SKEP_SECTION__KEY`) < `flags`.
pub fn load(file: Option<&Path>, flags: Flags) -> Result<Loaded, ConfigError> {
    let text = match file {
        Some(path) => Some(std::fs::read_to_string(path).map_err(|source| ConfigError::read(path, &source))?),
        None => None,
    };
    let mut layers = Figment::from(Named("default", Serialized::defaults(Config::default())));
    if let (Some(path), Some(text)) = (file, &text) {
        // toml's own parser reports syntax errors with their position.
        text.parse::<toml_edit::DocumentMut>().map_err(|error| ConfigError::syntax(path, text, &error))?;
        layers = layers.merge(Named(path.display().to_string(), Toml::string(text)));
    }
    let env = Env::prefixed("SKEP_").filter(|key| key.as_str().contains("__")).split("__");
    layers = layers.merge(env).merge(flags);
    let source = file.zip(text.as_deref());
    let config: Config = layers.extract().map_err(|error| ConfigError::value(&error, source))?;
    validate::check(&config).map_err(|bad| ConfigError::meaning(&bad, &layers, source))?;
    Ok(Loaded { config, file: file.map(Path::to_owned), layers })
}

/// A provider under another name.
struct Named<N, P>(N, P);

impl<N: Into<String> + Clone, P: Provider> Provider for Named<N, P> {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.0.clone().into())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        self.1.data()
    }
}
