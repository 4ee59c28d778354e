#!/bin/sh
# Succeeds if libzt can be found by LIBZT_PREFIX, pkg-config or CGO_LDFLAGS.
if [ -n "${LIBZT_PREFIX-}" ]; then
	ls "$LIBZT_PREFIX"/lib/libzt.so "$LIBZT_PREFIX"/lib/libzt.a 2>/dev/null | grep -q .
	exit
fi
pkg-config --exists libzt 2>/dev/null && exit
case "${CGO_LDFLAGS-}" in *zt*) exit 0 ;; esac
exit 1
