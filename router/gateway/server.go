package gateway

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"ztgate/router/control"
)

// server is the control API on a unix socket and, if configured, the HTTP server
// for metrics and health.
type server struct {
	sockets []net.Listener
	http    net.Listener // nil = off
	control *control.HTTPServer
	public  *control.HTTPServer
}

const (
	// maxPublic and maxControl are how many connections the two may have: far more
	// than monitoring and operators need, and few enough for their descriptors to be
	// there always (see [hostConnections]).
	maxPublic  = 32
	maxControl = 32
	// publicTimeout and controlTimeout bound a request; a ping may take long.
	publicTimeout  = 10 * time.Second
	controlTimeout = 30 * time.Second
)

// listen opens both listeners, so that a taken port is an error at once.
func listen(s *service, reg *prometheus.Registry) (_ *server, err error) {
	srv := &server{}
	defer func() {
		if err != nil {
			srv.close()
		}
	}()
	if srv.sockets, err = control.ListenSockets(s.config()); err != nil {
		return nil, err
	}
	complaints := log.New(&control.ErrorLog{Log: s.log}, "", 0)
	srv.control = control.NewHTTPServer(s.controlHandler(), maxControl, controlTimeout, complaints)
	if s.config().Listen == "" {
		return srv, nil
	}
	if srv.http, err = net.Listen("tcp", s.config().Listen); err != nil {
		if errors.Is(err, unix.EADDRINUSE) {
			err = fmt.Errorf("%w: choose another with --listen, or --listen= to switch it off", err)
		}
		return nil, fmt.Errorf("open HTTP server (listen from %s): %w", s.config().Origin("listen"), err)
	}
	s.registerMetrics(reg)
	srv.public = control.NewHTTPServer(s.httpHandler(reg), maxPublic, publicTimeout, complaints)
	for name, h := range map[string]*control.HTTPServer{"public": srv.public, "control": srv.control} {
		reg.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "ztgate_http_connections_closed_total",
			Help:        "Connections closed because there were too many, by server.",
			ConstLabels: prometheus.Labels{"server": name}}, func() float64 { return float64(h.Turned.Load()) }))
	}
	return srv, nil
}

// run serves until ctx ends.
func (srv *server) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	serve := func(s *control.HTTPServer, l net.Listener) {
		g.Go(func() error {
			if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serve %s: %w", l.Addr(), err)
			}
			return nil
		})
	}
	for _, l := range srv.sockets {
		serve(srv.control, l)
	}
	if srv.http != nil {
		serve(srv.public, srv.http)
	}
	g.Go(func() error {
		<-ctx.Done()
		grace, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		for _, s := range []*control.HTTPServer{srv.control, srv.public} {
			if s != nil && s.Shutdown(grace) != nil {
				_ = s.Close()
			}
		}
		return nil
	})
	return g.Wait()
}

// close frees the listeners; after run there is nothing left to do.
func (srv *server) close() {
	for _, l := range srv.sockets {
		_ = l.Close()
	}
	if srv.http != nil {
		_ = srv.http.Close()
	}
}

// socket names the control socket in the log.
func (srv *server) socket() string { return srv.sockets[0].Addr().String() }
