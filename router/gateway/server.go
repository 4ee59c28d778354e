package gateway

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"ztgate/router/config"
	"ztgate/router/control"
)

// server is the control API on a unix socket and, if configured, the HTTP server
// for metrics and health, and the API of the local service.
type server struct {
	parts []part
}

// part is one of the servers.
type part struct {
	name      string
	server    *control.HTTPServer
	listeners []net.Listener
}

const (
	// maxPublic, maxControl and maxAPI are how many connections the servers may have: far
	// more than monitoring, operators and a front end that asks for all networks at the
	// same time need, and few enough for their descriptors to be there always (see
	// [hostConnections]).
	maxPublic  = 32
	maxControl = 32
	maxAPI     = 128
	// publicTimeout, controlTimeout and apiTimeout bound a request; a ping may take long.
	publicTimeout  = 10 * time.Second
	controlTimeout = 30 * time.Second
	apiTimeout     = 30 * time.Second
)

// listen opens all listeners, so that a taken port is an error at once.
func listen(s *service, reg *prometheus.Registry) (_ *server, err error) {
	srv := &server{}
	defer func() {
		if err != nil {
			srv.close()
		}
	}()
	cfg := s.config()
	sockets, err := control.ListenSockets(cfg)
	if err != nil {
		return nil, err
	}
	complaints := log.New(&control.ErrorLog{Log: s.log}, "", 0)
	srv.parts = append(srv.parts, part{"control", control.NewHTTPServer(s.controlHandler(), maxControl, controlTimeout, complaints), sockets})
	if cfg.Listen == "" && cfg.API.Listen == "" {
		return srv, nil
	}
	s.registerMetrics(reg)
	metrics := s.metricsHandler(reg)
	if cfg.Listen != "" {
		l, err := listenTCP("HTTP server", cfg.Listen, "listen", cfg)
		if err != nil {
			return nil, err
		}
		srv.parts = append(srv.parts, part{"public", control.NewHTTPServer(s.httpHandler(metrics), maxPublic, publicTimeout, complaints), []net.Listener{l}})
	}
	if cfg.API.Listen != "" {
		guard, err := s.guardedAPI(metrics)
		if err != nil {
			return nil, err
		}
		l, err := listenTCP("API of the local service", cfg.API.Listen, "api.listen", cfg)
		if err != nil {
			return nil, err
		}
		registerGuard(reg, guard)
		srv.parts = append(srv.parts, part{"api", control.NewHTTPServer(guard, maxAPI, apiTimeout, complaints), []net.Listener{l}})
	}
	for _, p := range srv.parts {
		reg.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "ztgate_http_connections_closed_total",
			Help:        "Connections closed because there were too many, by server.",
			ConstLabels: prometheus.Labels{"server": p.name}}, func() float64 { return float64(p.server.Turned.Load()) }))
	}
	return srv, nil
}

func listenTCP(what, address, key string, cfg *config.Config) (net.Listener, error) {
	l, err := net.Listen("tcp", address)
	if err == nil {
		return l, nil
	}
	if errors.Is(err, unix.EADDRINUSE) {
		flag := strings.ReplaceAll(key, ".", "-")
		err = fmt.Errorf("%w: choose another with --%s, or --%[2]s= to switch it off", err, flag)
	}
	return nil, fmt.Errorf("open %s (%s from %s): %w", what, key, cfg.Origin(key), err)
}

// run serves until ctx ends.
func (srv *server) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, p := range srv.parts {
		for _, l := range p.listeners {
			g.Go(func() error {
				if err := p.server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
					return fmt.Errorf("serve %s: %w", l.Addr(), err)
				}
				return nil
			})
		}
	}
	g.Go(func() error {
		<-ctx.Done()
		grace, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		for _, p := range srv.parts {
			if p.server.Shutdown(grace) != nil {
				_ = p.server.Close()
			}
		}
		return nil
	})
	return g.Wait()
}

// close frees the listeners; after run there is nothing left to do.
func (srv *server) close() {
	for _, p := range srv.parts {
		for _, l := range p.listeners {
			_ = l.Close()
		}
	}
}

// socket names the control socket in the log.
func (srv *server) socket() string { return srv.parts[0].listeners[0].Addr().String() }
