package gateway

import (
	"log/slog"

	"golang.org/x/sys/unix"

	"ztgate/router/config"
	"ztgate/router/gateway/hostproxy"
	"ztgate/router/gateway/resolver"
)

const (
	// ownFiles are descriptors for everything but connections that others open: the
	// node's sockets, the TUN, files, and what the program itself connects to.
	ownFiles = 96
	// heldBack are descriptors that connections from outside never get: those of the
	// HTTP servers and the program's own.
	heldBack = maxPublic + maxControl + ownFiles
	// fewFiles is a limit that the operator should know of.
	fewFiles = 512
)

// openFiles returns how many descriptors this process may have. The Go runtime has
// raised that to the hard limit.
func openFiles() int {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return 1024
	}
	return int(min(l.Cur, 1<<20))
}

// filesFor returns the descriptors that there are besides those of the API.
func filesFor(cfg *config.Config) int {
	files := openFiles()
	if cfg.API.Listen != "" {
		files -= maxAPI
	}
	return files
}

// hostConnections is how many connections forwards on the host's addresses may have
// with so many descriptors.
func hostConnections(files int) int {
	return min(hostproxy.MaxConnections, max(files-heldBack, 1))
}

// proxyLimits are those of forwards on the host's addresses, and of what overlay hosts reach
// by this host's address: that needs a descriptor for each UDP session and ping, too.
func proxyLimits(cfg *config.Config, log *slog.Logger) (forwards, inbound hostproxy.Limits) {
	files := filesFor(cfg)
	if len(cfg.DNS.Listen) > 0 {
		files -= resolver.LimitsFor(files).Files()
	}
	if files < fewFiles {
		log.Warn("few open files are allowed", "limit", openFiles(), "forwards_on_host_addresses", hostConnections(files),
			"remedy", "raise the limit, as with LimitNOFILE= of systemd or --ulimit nofile= of docker")
	}
	forwards = hostproxy.Limits{Connections: hostConnections(files), PerClient: cfg.NAT.MaxFlowsPerClient,
		Idle: cfg.NAT.Timeouts.TCPEstablished, IdleUDP: cfg.NAT.Timeouts.UDP}
	inbound = forwards
	if cfg.ByHost() {
		all := max(files-heldBack, 4)
		forwards.Connections = min(forwards.Connections, all/2)
		inbound.Connections = min(forwards.Connections, all/4)
	}
	return forwards, inbound
}
