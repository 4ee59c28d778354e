// Package localapi is the API of zerotier-one's local service (docs/protocol/04 §12,
// §15), for front ends of a network controller and other programs that were made for
// it: what the node is, whom it knows, what it has joined, and its controller. It
// knows nothing of the process behind it.
package localapi

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/zerotier/ztnode"
)

// maxBody bounds what a caller may send; the controller has a bound of its own.
const maxBody = 64 << 10

// Process is what the API shows.
type Process interface {
	Info() control.Info
	// Peers lists those that are heard, and roots.
	Peers() []ztnode.Peer
	Networks() []control.NetworkView
	// Allowed says what a network, joined or not, may do.
	Allowed(id ztnode.NetworkID) Allowed
	Join(id ztnode.NetworkID) error
	Leave(id ztnode.NetworkID) error
	// Controller serves /controller; nil if the node is none.
	Controller() http.Handler
}

// Allowed is what the configuration lets a network do.
type Allowed struct {
	Global  bool // routes and addresses outside of private address space
	Default bool // a default route
}

// API answers requests of the local service.
type API struct {
	Process   Process
	Metrics   http.Handler   // nil = none
	AllowFrom []netip.Prefix // shown only; see [Guard]
	TCPRelay  bool           // shown only: whether one may be used
	Now       func() time.Time
}

// Handler serves all of the API, and nothing else.
func (a *API) Handler() http.Handler {
	mux := http.NewServeMux()
	a.Register(mux)
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNotFound) })
	return mux
}

// Register adds the paths of the API.
func (a *API) Register(mux *http.ServeMux) {
	get := func(pattern string, f func(*http.Request) (any, error)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			r.Body = http.MaxBytesReader(w, r.Body, maxBody)
			v, err := f(r)
			reply(w, v, err)
		})
	}
	get("GET /status", func(*http.Request) (any, error) { return a.status(a.Process.Info()), nil })
	get("GET /health", func(*http.Request) (any, error) { return a.health(a.Process.Info()), nil })
	get("GET /peer", func(*http.Request) (any, error) {
		out := []peer{}
		for _, p := range a.Process.Peers() {
			out = append(out, peerView(p))
		}
		return out, nil
	})
	get("GET /peer/{address}", func(r *http.Request) (any, error) {
		for _, p := range a.Process.Peers() {
			if strings.EqualFold(p.Address, r.PathValue("address")) {
				return peerView(p), nil
			}
		}
		return struct{}{}, nil
	})
	get("GET /network", func(*http.Request) (any, error) {
		out := []network{}
		for _, n := range a.Process.Networks() {
			out = append(out, networkView(n, a.Process.Allowed(n.ID)))
		}
		return out, nil
	})
	get("GET /network/{id}", func(r *http.Request) (any, error) { return a.joined(r) })
	get("POST /network/{id}", a.join)
	get("PUT /network/{id}", a.join)
	get("DELETE /network/{id}", a.leave)
	controller := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c := a.Process.Controller(); c != nil {
			c.ServeHTTP(w, r)
			return
		}
		w.WriteHeader(http.StatusNotFound)
	})
	for _, path := range []string{"/controller", "/controller/", "/unstable/controller/"} {
		mux.Handle(path, controller)
	}
	if a.Metrics != nil {
		mux.Handle("GET /metrics", a.Metrics)
	}
}

var errNotFound = errors.New("not found")

func (a *API) joined(r *http.Request) (network, error) {
	id, err := ztnode.ParseNetworkID(r.PathValue("id"))
	if err != nil {
		return network{}, errNotFound
	}
	nets := a.Process.Networks()
	i := slices.IndexFunc(nets, func(n control.NetworkView) bool { return n.ID == id })
	if i < 0 {
		return network{}, errNotFound
	}
	return networkView(nets[i], a.Process.Allowed(id)), nil
}

// join joins a network. What may be done with it is the configuration's affair: a
// body that wants it otherwise is refused, so that nobody believes it was.
func (a *API) join(r *http.Request) (any, error) {
	id, err := ztnode.ParseNetworkID(r.PathValue("id"))
	if err != nil {
		return nil, fault.Usage(err)
	}
	b, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, fault.Usagef("read body: %w", err)
	}
	want := map[string]any{}
	if len(b) > 0 && json.Unmarshal(b, &want) != nil {
		return nil, fault.Usagef("the body is no JSON object")
	}
	allowed := a.Process.Allowed(id)
	for key, is := range map[string]bool{"allowManaged": true, "allowGlobal": allowed.Global, "allowDefault": allowed.Default, "allowDNS": false} {
		if v, ok := want[key].(bool); ok && v != is {
			return nil, fault.Usagef("%s is %v: ztgate's configuration says so (networks)", key, is)
		}
	}
	if _, err := a.joined(r); err != nil {
		if err := a.Process.Join(id); err != nil {
			return nil, err
		}
	}
	return a.joined(r)
}

func (a *API) leave(r *http.Request) (any, error) {
	if _, err := a.joined(r); err != nil {
		return struct{}{}, nil
	}
	id, err := ztnode.ParseNetworkID(r.PathValue("id"))
	if err == nil {
		err = a.Process.Leave(id)
	}
	return map[string]bool{"result": true}, err
}

// reply writes an answer or, in the reference's form, an error.
func reply(w http.ResponseWriter, v any, err error) {
	code := http.StatusOK
	switch {
	case errors.Is(err, errNotFound):
		code, v = http.StatusNotFound, struct{}{}
	case err != nil:
		code = http.StatusInternalServerError
		if fault.KindOf(err) == fault.KindUsage {
			code = http.StatusBadRequest
		}
		v = map[string]any{"error": code, "description": err.Error()}
	}
	control.WriteJSON(w, code, v)
}
