# Sourced at the root of a checkout with a .venv, before uv is called.
# pip trusts the certificates of the system and those that it was told of; uv knows Mozilla's alone, which are of no use
# behind a company's proxy. A system without a store (a bare container) keeps uv's.
if .venv/bin/python -c 'import os, ssl, sys; paths = ssl.get_default_verify_paths()
sys.exit(not (sys.platform == "darwin" or paths.cafile or paths.capath and os.listdir(paths.capath)))'; then
  export UV_SYSTEM_CERTS=${UV_SYSTEM_CERTS:-true}
fi
certificates=${SSL_CERT_FILE:-${PIP_CERT:-$(.venv/bin/python -m pip config get global.cert 2>/dev/null || true)}}
[ -z "$certificates" ] || export SSL_CERT_FILE=$certificates
