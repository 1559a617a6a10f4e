"""How a cluster is reached, by the official client with a kubeconfig or a pod's own account; and how it says no.

The client is imported when it is asked for: rendering needs none.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import yaml

from configs.errors import ConfigError, CrosstuneError, RunFailedError
from configs.schema.launcher_kubernetes import KubernetesLauncherConfig

NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
WORDS = 1200
"""Of the server, at most, in a message."""


class LostError(RunFailedError):
    """The API server did not answer for too long."""


class NotThereError(ConfigError):
    """It knows no such object, or no such kind of object."""


class ExistsError(ConfigError):
    """What there is of this name is in the way."""


def connect(cfg: KubernetesLauncherConfig) -> tuple[Any, str]:
    """The official client, and the namespace that its config names.

    Raises:
        ConfigError: it is not installed, or there is no usable config.
    """
    try:
        from kubernetes import client, config
    except ImportError:
        raise ConfigError(
            "launcher", "the client of Kubernetes is not installed here", remedy="pip install 'crosstune[k8s]'"
        ) from None
    settings = client.Configuration()
    file = os.path.expanduser(cfg.kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config")
    try:
        if cfg.kubeconfig or any(os.path.exists(part) for part in file.split(os.pathsep)):
            config.load_kube_config(file, context=cfg.context, client_configuration=settings)
            contexts, active = config.list_kube_config_contexts(file)
            chosen = next((each for each in contexts if each["name"] == cfg.context), active)
            namespace = chosen["context"].get("namespace") or "default"
        else:
            config.load_incluster_config(client_configuration=settings)
            namespace = NAMESPACE_FILE.read_text(encoding="utf-8").strip()
    except (config.ConfigException, OSError, yaml.YAMLError) as error:
        raise ConfigError(
            "launcher.kubeconfig", f"{file}: {error}", remedy="launcher.kubeconfig=FILE, launcher.context=NAME"
        ) from None
    settings.retries = False  # ours know which requests may be sent again
    return client.ApiClient(settings), namespace


def refused(error: Any, where: str) -> CrosstuneError:
    """A refusal in the server's own words."""
    status, words = error.status, words_of(error)
    if status == 404:
        return NotThereError(where, words)
    if status == 409:
        return ExistsError(where, words)
    if status in (401, 403):
        return ConfigError(where, f"not allowed: {words}", remedy="kubectl auth can-i --list, launcher.namespace=...")
    return ConfigError(where, f"refused by the server ({status}): {words}")


def words_of(error: Any) -> str:
    """What the server says, without what it wraps it in."""
    body = error.body or ""
    try:
        text = str(json.loads(body).get("message") or error.reason)
    except (json.JSONDecodeError, AttributeError):
        text = body.strip() or str(error.reason)
    return text if len(text) <= WORDS else f"{text[:WORDS]} ..."
