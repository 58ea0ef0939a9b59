//! Layers file, environment and flags, and says where a bad value came from.

use std::path::{Path, PathBuf};

use figment::{
    Figment, Metadata, Profile, Provider,
    providers::{Env, Format, Serialized, Toml},
    value::{Dict, Map, Value},
};

use super::{Config, ConfigError, validate};

/// Names of layers. The file's is its path.
const DEFAULT: &str = "default";
const ENVIRONMENT: &str = "environment";
/// How the names of environment variables begin.
const PREFIX: &str = "SKEP_";

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
    /// Where the value at a dotted path came from, as in `skep.toml` or `environment variable SKEP_SERVER__MAX_WAIT`.
    pub fn origin(&self, path: &str) -> String {
        origin(&self.layers, path).unwrap_or_else(|| DEFAULT.to_owned())
    }
}

/// Who set the value at a path; `None` where nobody did.
fn origin(layers: &Figment, path: &str) -> Option<String> {
    let mut parts = path.split('.');
    let mut value = layers.find_value(parts.next()?).ok()?;
    for part in parts {
        value = match value {
            Value::Dict(_, mut keys) => keys.remove(part)?,
            Value::Array(_, elements) => elements.into_iter().nth(part.parse().ok()?)?,
            _ => return None,
        };
    }
    layers.get_metadata(value.tag()).map(|metadata| name(metadata, path))
}

/// Who set the value at a path or, where nobody did, what it would lie in.
pub(super) fn nearest_origin(layers: &Figment, path: &str) -> Option<String> {
    origin(layers, path).or_else(|| nearest_origin(layers, path.rsplit_once('.')?.0))
}

/// The name of a layer; for the environment that of the variable.
pub(super) fn name(layer: &Metadata, path: &str) -> String {
    if layer.name != ENVIRONMENT {
        return layer.name.to_string();
    }
    let variable: Vec<_> = path.split('.').take(2).map(str::to_uppercase).collect();
    format!("environment variable {PREFIX}{}", variable.join("__"))
}

/// Reads and checks the configuration: defaults < `file` < environment (`SKEP_SECTION__KEY`) < `flags`.
pub fn load(file: Option<&Path>, flags: Flags) -> Result<Loaded, ConfigError> {
    let text = match file {
        Some(path) => Some(std::fs::read_to_string(path).map_err(|source| ConfigError::read(path, &source))?),
        None => None,
    };
    let mut layers = Figment::from(Named(DEFAULT, Serialized::defaults(Config::default())));
    if let (Some(path), Some(text)) = (file, &text) {
        // toml's own parser reports syntax errors with their position.
        text.parse::<toml_edit::DocumentMut>().map_err(|error| ConfigError::syntax(path, text, &error))?;
        layers = layers.merge(Named(path.display().to_string(), Toml::string(text)));
    }
    let env = Env::prefixed(PREFIX).filter(|key| key.as_str().contains("__")).split("__");
    layers = layers.merge(Named(ENVIRONMENT, env)).merge(flags);
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
