"""Clients of object stores, with the credentials, endpoints and regions that other tools of a cloud use.

The environment variables are those of obstore, which include the clouds' own (``AWS_ACCESS_KEY_ID``,
``AWS_ENDPOINT_URL``, ``GOOGLE_APPLICATION_CREDENTIALS``, ``AZURE_STORAGE_ACCOUNT_NAME`` and many more).
Profiles and single sign-on need the cloud's own package: boto3, google-auth or azure-identity.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from datetime import timedelta
from typing import Any
from urllib.parse import unquote, urlsplit

from retrotool.errors import UsageError

TIMEOUT_VARIABLE = "RETROTOOL_CLOUD_TIMEOUT"
_TIMEOUT_SECONDS = 30.0  # of one request
_CONNECT_SECONDS = 5.0
_RETRIES = 3
_AWS_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI")
_GOOGLE_KEYS = ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_SKIP_SIGNATURE")
_AZURE_KEYS = (
    "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY", "AZURE_CLIENT_SECRET",
    "AZURE_SKIP_SIGNATURE",
)  # fmt: skip
_AWS_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_ENDPOINTS = (*_AWS_ENDPOINTS, "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT", "GOOGLE_BASE_URL")


def bucket_of(place: str) -> tuple[str, str]:
    """Return the bucket of a place, and what its keys begin with: "" or a path that ends with ``/``."""
    parts = urlsplit(place)
    path = unquote(parts.path).strip("/")
    return parts.netloc.partition("@")[0], f"{path}/" if path else ""


def open_client(place: str) -> Any:
    """Return obstore's client for a place such as ``s3://bucket/path``; ``UsageError`` if it is not one."""
    import obstore.store

    scheme = place.partition("://")[0]
    options: dict[str, Any] = {}
    if scheme == "s3":
        options = _aws()
    elif scheme == "gs" and not _has(*_GOOGLE_KEYS):
        options = _google()
    elif scheme in ("az", "abfs", "abfss") and not _has(*_AZURE_KEYS, "AZURE_STORAGE_USE_EMULATOR"):
        options = _azure()
    seconds = timeout_seconds()
    client: dict[str, Any] = {
        "timeout": timedelta(seconds=seconds),
        "connect_timeout": timedelta(seconds=min(seconds, _CONNECT_SECONDS)),
    }
    if any(one.startswith("http://") for one in (place, *map(os.environ.get, _ENDPOINTS)) if one):
        client["allow_http"] = True
    retry = {"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=4 * seconds)}
    # Hosts of AWS and Azure are read by HTTPS like others.
    from_url: Any = obstore.store.HTTPStore.from_url if scheme in ("http", "https") else obstore.store.from_url
    try:
        return from_url(place, client_options=client, retry_config=retry, **options)
    except Exception as error:  # of obstore, or of a package for credentials
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"{place}: {what}",
            "A place looks like s3://BUCKET/PATH, gs://BUCKET/PATH or az://CONTAINER/PATH; credentials are those of "
            "the cloud's environment variables and profiles.",
        ) from error


def _has(*names: str) -> bool:
    return any(os.environ.get(name) for name in names)


def timeout_seconds() -> float:
    """Return how long to wait for the answer to one request."""
    return float(os.environ.get(TIMEOUT_VARIABLE) or _TIMEOUT_SECONDS)


def _aws() -> dict[str, Any]:
    """Return obstore's settings for S3, and where credentials come from; boto3 knows profiles."""
    endpoint, region, session = _aws_account()
    # Few servers of others delete many objects in one request.
    own = {} if endpoint is None else {"endpoint": endpoint, "disable_bulk_delete": True}
    options: dict[str, Any] = {"config": {"region": region, **own}}
    if session is not None:
        from obstore.auth.boto3 import Boto3CredentialProvider

        options["credential_provider"] = Boto3CredentialProvider(session)
    return options


def _aws_account() -> tuple[str | None, str, Any]:
    """Return endpoint and region, and boto3's session if the credentials are not in the environment."""
    endpoint = next((os.environ[name] for name in _AWS_ENDPOINTS if os.environ.get(name)), None)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not _has(*_AWS_KEYS, "AWS_SKIP_SIGNATURE") and importlib.util.find_spec("boto3"):
        import boto3

        session = boto3.session.Session()
        region = region or session.region_name
        if session.get_credentials() is not None:
            return endpoint or _profile_endpoint(session), region or "us-east-1", session
    return endpoint, region or "us-east-1", None


def boto3_client() -> Any:
    """Return boto3's client of S3, for requests that obstore lacks; ``ModuleNotFoundError`` without boto3."""
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    endpoint, region, session = _aws_account()
    seconds = timeout_seconds()
    config = Config(
        connect_timeout=min(seconds, _CONNECT_SECONDS), read_timeout=seconds, max_pool_connections=16,
        retries={"mode": "standard", "total_max_attempts": 1 + _RETRIES},
        signature_version=UNSIGNED if _has("AWS_SKIP_SIGNATURE") else None,
    )  # fmt: skip
    session = session or boto3.session.Session()
    return session.client("s3", endpoint_url=endpoint, region_name=region, config=config)


def _profile_endpoint(session: Any) -> str | None:
    """Return the endpoint of a profile; None for that of AWS."""
    found: str = session.client("s3", region_name=session.region_name or "us-east-1").meta.endpoint_url
    return None if found.endswith(".amazonaws.com") else found


def _google() -> dict[str, Any]:
    if importlib.util.find_spec("google") and importlib.util.find_spec("google.auth"):
        from google.auth.exceptions import DefaultCredentialsError
        from obstore.auth.google import GoogleCredentialProvider

        with contextlib.suppress(DefaultCredentialsError):
            return {"credential_provider": GoogleCredentialProvider()}
    return {}


def _azure() -> dict[str, Any]:
    if importlib.util.find_spec("azure") and importlib.util.find_spec("azure.identity"):
        from obstore.auth.azure import AzureCredentialProvider

        return {"credential_provider": AzureCredentialProvider()}
    return {}


def google_session() -> tuple[Any, str]:
    """Return a session of requests with Google's credentials, and the address of Cloud Storage.

    ``ModuleNotFoundError`` without requests or google-auth.
    """
    import requests

    address = (os.environ.get("GOOGLE_BASE_URL") or "https://storage.googleapis.com").rstrip("/")
    if _has("GOOGLE_SKIP_SIGNATURE"):
        return requests.Session(), address
    import google.auth
    from google.auth.transport.requests import AuthorizedSession

    scopes = ["https://www.googleapis.com/auth/devstorage.full_control"]
    file = os.environ.get("GOOGLE_SERVICE_ACCOUNT") or os.environ.get("GOOGLE_SERVICE_ACCOUNT_PATH")
    if key := os.environ.get("GOOGLE_SERVICE_ACCOUNT_KEY"):
        credentials, _ = google.auth.load_credentials_from_dict(json.loads(key), scopes)
    elif file:
        credentials, _ = google.auth.load_credentials_from_file(file, scopes)
    else:
        credentials, _ = google.auth.default(scopes)
    return AuthorizedSession(credentials), address


def azure_service(place: str) -> Any:
    """Return azure-storage-blob's client of the account of a place; ``ModuleNotFoundError`` without it."""
    from azure.storage.blob import BlobServiceClient

    account = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME", "")
    if "@" in (host := urlsplit(place).netloc):
        account = host.partition("@")[2].partition(".")[0]
    endpoint = os.environ.get("AZURE_STORAGE_ENDPOINT") or os.environ.get("AZURE_ENDPOINT")
    credential: Any = os.environ.get("AZURE_STORAGE_SAS_TOKEN") or os.environ.get("AZURE_STORAGE_SAS_KEY")
    if key := os.environ.get("AZURE_STORAGE_ACCOUNT_KEY"):
        credential = {"account_name": account, "account_key": key}
    elif credential is None and not _has("AZURE_SKIP_SIGNATURE"):
        from azure.identity import DefaultAzureCredential

        credential = DefaultAzureCredential()
    return BlobServiceClient(endpoint or f"https://{account}.blob.core.windows.net", credential)
