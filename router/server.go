package router

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// server is the control API on a unix socket and, if configured, the HTTP server
// for metrics and health.
type server struct {
	sockets []net.Listener
	http    net.Listener // nil = off
	control *http.Server
	public  *http.Server
}

// listen opens both listeners, so that a taken port is an error at once.
func listen(s *service, reg *prometheus.Registry) (_ *server, err error) {
	srv := &server{}
	defer func() {
		if err != nil {
			srv.close()
		}
	}()
	if srv.sockets, err = listenSockets(s.config()); err != nil {
		return nil, err
	}
	complaints := log.New(&errorLog{log: s.log}, "", 0)
	srv.control = newHTTPServer(s.controlHandler(), complaints)
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
	srv.public = newHTTPServer(s.httpHandler(reg), complaints)
	return srv, nil
}

// Serve runs the control API and the HTTP server of a node and, unless it is
// nil, a forwarding plane that somebody else runs. It sets nothing up in the
// kernel.
func Serve(ctx context.Context, cfg *Config, mode string, log *slog.Logger, node Node, plane Plane) error {
	s := newService(cfg, mode, log, node, plane, time.Now())
	srv, err := listen(s, newRegistry(cfg))
	if err != nil {
		return err
	}
	defer srv.close()
	changes, stop := node.Watch()
	defer stop()
	return runAll(ctx, log, srv.run, s.targets.Run, func(ctx context.Context) error {
		return s.follow(ctx, changes, func([]Network) {}, undisturbed)
	})
}

func newHTTPServer(h http.Handler, complaints *log.Logger) *http.Server {
	return &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 30 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10, ErrorLog: complaints}
}

// errorLogEvery is how often the HTTP servers' complaints are logged: without
// descriptors they complain at every attempt to accept a connection.
const errorLogEvery = time.Minute

// errorLog writes complaints of HTTP servers to the log.
type errorLog struct {
	log *slog.Logger

	mu   sync.Mutex
	next time.Time
	left int // out, since the last one
}

func (l *errorLog) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if now.Before(l.next) {
		l.left++
		return len(b), nil
	}
	l.log.Warn("HTTP server", "problem", strings.TrimSpace(string(b)), "left_out", l.left)
	l.next, l.left = now.Add(errorLogEvery), 0
	return len(b), nil
}

// listenSockets opens the control socket: the configured one, or the default one
// and one inside home, by which a command with --home finds this process among
// several.
func listenSockets(cfg *Config) ([]net.Listener, error) {
	paths := []string{cfg.Socket}
	if cfg.Socket == "" {
		paths = []string{DefaultSocket, homeSocket(cfg.Home)}
	}
	var out []net.Listener
	var errs []error
	for _, path := range paths {
		l, err := openSocket(path)
		if err != nil {
			errs = append(errs, fmt.Errorf("open control socket %s: %w", path, err))
			continue
		}
		out = append(out, l)
	}
	if len(out) == 0 {
		return nil, errors.Join(errs...)
	}
	return out, nil
}

func homeSocket(home string) string { return filepath.Join(home, "ztgate.sock") }

var errSocketInUse = errors.New("another process answers on it: stop that one or choose another with --socket")

// maxSocketPath is what fits a unix socket address.
const maxSocketPath = 107

func openSocket(path string) (net.Listener, error) {
	if len(path) > maxSocketPath {
		return nil, fmt.Errorf("the path has %d bytes, %d are possible: choose a shorter one with --socket", len(path), maxSocketPath)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, err
	}
	fi, err := os.Lstat(path)
	switch {
	case err == nil && fi.Mode()&os.ModeSocket == 0:
		return nil, errors.New("a file of another kind is there: remove it or choose another path with --socket")
	case err == nil:
		if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
			_ = c.Close()
			return nil, errSocketInUse
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o660); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// run serves until ctx ends.
func (srv *server) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	serve := func(s *http.Server, l net.Listener) {
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
		for _, s := range []*http.Server{srv.control, srv.public} {
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

// maxBody bounds what a caller of the control API may send.
const maxBody = 4 << 20

func (s *service) controlHandler() http.Handler {
	mux := http.NewServeMux()
	get := func(pattern string, f func(*http.Request) (any, error)) { mux.HandleFunc(pattern, answer(f)) }
	get("GET /v1/status", func(*http.Request) (any, error) { return s.status(), nil })
	get("GET /v1/info", func(*http.Request) (any, error) { return s.info(), nil })
	get("GET /v1/health", func(*http.Request) (any, error) { return s.health(), nil })
	get("GET /v1/networks", func(*http.Request) (any, error) { return Networks{Schema, s.networkViews()}, nil })
	get("GET /v1/peers", func(*http.Request) (any, error) { return Peers{Schema, s.peers()}, nil })
	get("GET /v1/config", func(*http.Request) (any, error) {
		return Configuration{Schema, s.config().Values(), s.config().Warnings}, nil
	})
	get("GET /v1/flows", func(r *http.Request) (any, error) {
		f, err := flowFilter(r.FormValue)
		if err != nil {
			return nil, err
		}
		return s.flows(f)
	})
	get("POST /v1/networks/{id}", func(r *http.Request) (any, error) { return s.join(r.PathValue("id")) })
	get("DELETE /v1/networks/{id}", func(r *http.Request) (any, error) { return s.leave(r.PathValue("id")) })
	get("POST /v1/reload", func(*http.Request) (any, error) { return s.reloadConfig() })
	get("POST /v1/explain", func(r *http.Request) (any, error) {
		var q Question
		if err := readJSON(r, &q); err != nil {
			return nil, err
		}
		return s.explain(q)
	})
	get("GET /v1/moons", func(*http.Request) (any, error) { return s.moons() })
	get("POST /v1/moons/{id}", func(r *http.Request) (any, error) { return s.orbit(r.PathValue("id"), r.FormValue("seed")) })
	get("DELETE /v1/moons/{id}", func(r *http.Request) (any, error) { return s.deorbit(r.PathValue("id")) })
	get("POST /v1/ping", func(r *http.Request) (any, error) {
		var req PingRequest
		if err := readJSON(r, &req); err != nil {
			return nil, err
		}
		return s.ping(r.Context(), req)
	})
	s.controllerRoutes(get)
	s.compatRoutes(mux)
	get("/", func(r *http.Request) (any, error) {
		return nil, usagef("%s %s is not part of the control API of this version", r.Method, r.URL.Path)
	})
	return mux
}

// answer wraps a handler whose result or error becomes JSON.
func answer(f func(*http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		v, err := f(r)
		code := http.StatusOK
		if err != nil {
			v, code = NewErrorView(err), http.StatusInternalServerError
			switch KindOf(err) {
			case KindUsage:
				code = http.StatusBadRequest
			case KindNotReady:
				code = http.StatusServiceUnavailable
			}
		}
		writeJSON(w, code, v)
	}
}

func writeJSON(w http.ResponseWriter, code int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		code = http.StatusInternalServerError
		b, _ = json.Marshal(NewErrorView(fmt.Errorf("encode answer: %w", err)))
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	_, _ = w.Write(append(b, '\n')) // the caller may have gone
}

func readJSON(r *http.Request, v any) error {
	dec := json.NewDecoder(r.Body)
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return usagef("read request: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return usagef("read request: more than one value")
	}
	return nil
}

// flowFilter reads the parameters of a question for flows.
func flowFilter(value func(string) string) (f FlowFilter, err error) {
	for _, a := range []struct {
		name string
		to   *netip.Prefix
	}{{"to", &f.To}, {"from", &f.From}} {
		if v := value(a.name); v != "" {
			p, err := parseAddress(v)
			if err != nil {
				return f, usagef("--%s %q: give ADDRESS or ADDRESS/BITS", a.name, v)
			}
			*a.to = p.Masked()
		}
	}
	f.Protocol, f.State = value("protocol"), value("state")
	if v := value("network"); v != "" {
		if f.Network, err = ParseNetworkID(v); err != nil {
			return f, Usage(err)
		}
	}
	if top := value("top"); top != "" {
		if f.Top, err = strconv.Atoi(top); err != nil || f.Top < 0 {
			return f, usagef("--top %q: give a number", top)
		}
	}
	return f, nil
}

func (s *service) join(text string) (any, error) {
	id, err := ParseNetworkID(text)
	if err != nil {
		return nil, Usage(err)
	}
	if s.mode == ModeNode {
		return nil, usagef("this process has no interface to join networks with: run ztgate run or ztgate member")
	}
	if err := s.node.Join(id); err != nil {
		return nil, fmt.Errorf("join network %s: %w", id, err)
	}
	return Networks{Schema, s.only(id)}, nil
}

func (s *service) only(id NetworkID) []NetworkView {
	out := []NetworkView{}
	for _, n := range s.networkViews() {
		if n.ID == id {
			out = append(out, n)
		}
	}
	return out
}

func (s *service) leave(text string) (any, error) {
	id, err := ParseNetworkID(text)
	if err != nil {
		return nil, Usage(err)
	}
	left := s.only(id)
	if err := s.node.Leave(id); err != nil {
		return nil, fmt.Errorf("leave network %s: %w", id, err)
	}
	return Networks{Schema, left}, nil
}

// Record is a record of the network controller.
type Record struct {
	Schema int             `json:"schema"`
	Record json.RawMessage `json:"record"`
}

// Records is a list of them.
type Records struct {
	Schema  int               `json:"schema"`
	Records []json.RawMessage `json:"records"`
}

func (s *service) controllerRoutes(get func(string, func(*http.Request) (any, error))) {
	with := func(pattern string, f func(c Controller, id NetworkID, r *http.Request) (any, error)) {
		get(pattern, func(r *http.Request) (any, error) {
			c := s.node.Controller()
			if c == nil {
				return nil, usagef("this node is no controller: start it with --controller")
			}
			var id NetworkID
			if text := r.PathValue("id"); text != "" {
				var err error
				if id, err = ParseNetworkID(text); err != nil {
					return nil, Usage(err)
				}
			}
			return f(c, id, r)
		})
	}
	record := func(b json.RawMessage, err error) (any, error) {
		if err != nil {
			return nil, err
		}
		return Record{Schema, b}, nil
	}
	patch := func(r *http.Request) (json.RawMessage, error) {
		var b json.RawMessage
		return b, readJSON(r, &b)
	}
	with("GET /v1/controller/networks", func(c Controller, _ NetworkID, _ *http.Request) (any, error) {
		ids, err := c.Networks()
		if err != nil {
			return nil, err
		}
		out := Records{Schema, []json.RawMessage{}}
		for _, id := range ids {
			b, err := c.Network(id)
			if err != nil {
				return nil, err
			}
			out.Records = append(out.Records, b)
		}
		return out, nil
	})
	set := func(c Controller, id NetworkID, r *http.Request) (any, error) {
		b, err := patch(r)
		if err != nil {
			return nil, err
		}
		return record(c.SetNetwork(id, b))
	}
	with("POST /v1/controller/networks", set)
	with("POST /v1/controller/networks/{id}", set)
	with("GET /v1/controller/networks/{id}", func(c Controller, id NetworkID, _ *http.Request) (any, error) {
		return record(c.Network(id))
	})
	with("DELETE /v1/controller/networks/{id}", func(c Controller, id NetworkID, _ *http.Request) (any, error) {
		b, err := c.Network(id)
		if err != nil {
			return nil, err
		}
		return record(b, c.DeleteNetwork(id))
	})
	with("GET /v1/controller/networks/{id}/members", func(c Controller, id NetworkID, _ *http.Request) (any, error) {
		list, err := c.Members(id)
		if err != nil {
			return nil, err
		}
		return Records{Schema, append([]json.RawMessage{}, list...)}, nil
	})
	with("GET /v1/controller/networks/{id}/members/{address}", func(c Controller, id NetworkID, r *http.Request) (any, error) {
		return record(c.Member(id, r.PathValue("address")))
	})
	with("POST /v1/controller/networks/{id}/members/{address}", func(c Controller, id NetworkID, r *http.Request) (any, error) {
		if !validNodeAddress(r.PathValue("address")) {
			return nil, usagef("member %q: want 10 hex digits, as in fcd8055969", r.PathValue("address"))
		}
		b, err := patch(r)
		if err != nil {
			return nil, err
		}
		return record(c.SetMember(id, r.PathValue("address"), b))
	})
	with("DELETE /v1/controller/networks/{id}/members/{address}", func(c Controller, id NetworkID, r *http.Request) (any, error) {
		b, err := c.Member(id, r.PathValue("address"))
		if err != nil {
			return nil, err
		}
		return record(b, c.DeleteMember(id, r.PathValue("address")))
	})
}

func validNodeAddress(s string) bool {
	_, err := strconv.ParseUint(s, 16, 64)
	return err == nil && len(s) == 10
}

// prefixList is for the status page.
func prefixList(list []netip.Prefix) string {
	out := ""
	for i, p := range list {
		if i > 0 {
			out += ", "
		}
		out += p.String()
	}
	return out
}
