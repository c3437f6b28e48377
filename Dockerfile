# One image for sessions, schedules and single commands: docker build -t trader .
FROM python:3.11-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/trader
ENV PATH=/opt/trader/bin:$PATH
WORKDIR /src
# What is pinned first: a change of the library does not install its needs anew.
COPY constraints.txt settings.ini setup.py pyproject.toml MANIFEST.in README.md LICENSE CHANGELOG.md ./
RUN mkdir trader_lib && touch trader_lib/__init__.py \
    && pip install --constraint constraints.txt '.[observe,research,runs,scale,schedule]' \
    && pip uninstall --yes trader_lib
COPY trader_lib trader_lib
RUN pip install --constraint constraints.txt --no-deps . && python -m compileall -q /opt/trader

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="trader_lib" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/trader-lib/trader_lib"
RUN groupadd --gid 10001 trader \
    && useradd --uid 10001 --gid trader --no-create-home --home-dir /tmp --shell /usr/sbin/nologin trader \
    && install --directory --owner trader --group trader /runs /work
COPY --from=build /opt/trader /opt/trader
COPY --chmod=0755 deploy/session.sh /usr/local/bin/trader-session
# The root may be read-only: what is written goes to /runs (keep it) and /tmp (a tmpfs).
ENV PATH=/opt/trader/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    NUMBA_CACHE_DIR=/runs/.numba \
    TRADER_RUNS__PATH=/runs \
    TRADER_RUNS__SCHEDULE_PATH=/runs/.schedule.sqlite \
    TRADER_JOURNAL__LEDGER_PATH=/runs/.ledger.sqlite \
    TRADER_DATA__STORE_PATH=/runs/.store \
    TRADER_LOGGING__TERMINAL=json \
    TRADER_MONITORING__HOST=0.0.0.0 \
    TRADER_MONITORING__PORT=8080
USER 10001:10001
WORKDIR /work
VOLUME /runs
EXPOSE 8080
STOPSIGNAL SIGTERM
# Of a session; other commands show nothing on 8080 and are given --no-healthcheck.
HEALTHCHECK --interval=30s --timeout=5s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/healthz', timeout=4)"]
ENTRYPOINT ["trader"]
CMD ["--help"]
