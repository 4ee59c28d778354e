package controller

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"ztgate/zerotier/identity"
	"ztgate/zerotier/vl2"
)

const (
	apiVersion = 4
	maxBody    = 4 << 20
)

// Handler serves the controller's HTTP API of the reference (chapter 04 §12), so that
// front ends made for that can be used. It asks for no token: whoever can reach it may
// do everything.
//
// It is stricter than the reference: what can't be stored as it was sent is refused
// with 400 instead of left out, and so are networks of other controllers. In addition a
// network takes the text of its rules as rulesSource, see [Network.Patch].
func (c *Controller) Handler() http.Handler {
	mux := http.NewServeMux()
	handle := func(methods, path string, f func(r *http.Request) (any, error)) {
		for _, m := range strings.Fields(methods) {
			mux.HandleFunc(m+" "+path, func(w http.ResponseWriter, r *http.Request) {
				r.Body = http.MaxBytesReader(w, r.Body, maxBody)
				v, err := f(r)
				reply(w, v, err)
			})
		}
	}
	const network, member = "/controller/network/{network}", "/controller/network/{network}/member"
	handle("GET", "/controller", func(*http.Request) (any, error) {
		return map[string]any{"controller": true, "apiVersion": apiVersion, "clock": c.now().UnixMilli(), "databaseReady": true}, nil
	})
	handle("GET", "/controller/network", func(*http.Request) (any, error) { return c.networkIDs(), nil })
	handle("POST PUT", "/controller/network", func(r *http.Request) (any, error) { return c.postNetwork(0, r) })
	handle("GET", network, c.forNetwork(func(n Network, _ *http.Request) (any, error) { return n, nil }))
	handle("POST PUT", network, func(r *http.Request) (any, error) {
		id, err := c.newNetworkID(r.PathValue("network"))
		if err != nil {
			return nil, err
		}
		return c.postNetwork(id, r)
	})
	handle("DELETE", network, c.forNetwork(func(n Network, _ *http.Request) (any, error) {
		return n, c.DeleteNetwork(n.ID)
	}))
	handle("GET", member, c.forNetwork(func(n Network, _ *http.Request) (any, error) {
		out := map[string]uint64{}
		for _, m := range c.Members(n.ID) {
			out[m.Address.String()] = m.Revision
		}
		return out, nil
	}))
	handle("GET", member+"/{member}", c.forMember(func(n Network, a identity.Address, _ *http.Request) (any, error) {
		return c.existing(n.ID, a)
	}))
	handle("POST PUT", member+"/{member}", c.forMember(func(n Network, a identity.Address, r *http.Request) (any, error) {
		body, err := readBody(r)
		if err != nil {
			return nil, err
		}
		return c.UpdateMember(n.ID, a, func(m *Member) error { return invalid(m.Patch(body)) })
	}))
	handle("DELETE", member+"/{member}", c.forMember(func(n Network, a identity.Address, _ *http.Request) (any, error) {
		m, err := c.existing(n.ID, a)
		if err != nil {
			return nil, err
		}
		return m, c.DeleteMember(n.ID, a)
	}))
	handle("GET", "/unstable/controller/network", func(*http.Request) (any, error) { return c.allNetworks() })
	handle("GET", "/unstable"+member, c.forNetwork(func(n Network, _ *http.Request) (any, error) {
		list := c.Members(n.ID)
		return map[string]any{"data": list, "meta": map[string]int{"totalCount": len(list), "authorizedCount": authorized(list)}}, nil
	}))
	return mux
}

// syntaxError says that a body is no JSON: the reference answers those with 500.
type syntaxError struct{ error }

func invalid(err error) error {
	if err != nil {
		return wrap(err, ErrInvalid)
	}
	return nil
}

// reply writes a record or an error.
func reply(w http.ResponseWriter, v any, err error) {
	code := http.StatusOK
	var b []byte
	if err == nil {
		b, err = json.Marshal(v)
	}
	if err != nil {
		switch {
		case errors.Is(err, ErrNotFound):
			w.WriteHeader(http.StatusNotFound)
			return
		case errors.Is(err, ErrInvalid), errors.Is(err, ErrExists):
			code = http.StatusBadRequest
		default:
			code = http.StatusInternalServerError
		}
		if b, err = json.Marshal(map[string]any{"error": code, "description": err.Error()}); err != nil {
			b = []byte("{}")
		}
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	_, _ = w.Write(b) // the caller may have gone
}

// readBody returns a JSON object; anything else that is JSON counts as an empty one.
func readBody(r *http.Request) ([]byte, error) {
	b, err := io.ReadAll(r.Body)
	if err != nil {
		return nil, invalid(fmt.Errorf("read body: %w", err))
	}
	b = bytes.TrimSpace(b)
	switch {
	case len(b) == 0:
		return []byte("{}"), nil
	case !json.Valid(b):
		return nil, syntaxError{errors.New("the body is no JSON")}
	case b[0] != '{':
		return []byte("{}"), nil
	}
	return b, nil
}

func (c *Controller) networkIDs() []string {
	out := []string{}
	for _, n := range c.Networks() {
		out = append(out, n.ID.String())
	}
	return out
}

// newNetworkID reads the ID of a network to be made or changed; 0 stands for a random
// one, which is asked for by six underscores after our address.
func (c *Controller) newNetworkID(s string) (vl2.NetworkID, error) {
	if prefix, ok := strings.CutSuffix(s, "______"); ok {
		if !strings.EqualFold(prefix, c.self.String()) {
			return 0, fmt.Errorf("%w: %s is not this controller's address, %s", ErrInvalid, prefix, c.self)
		}
		return 0, nil
	}
	id, err := vl2.ParseNetworkID(s)
	if err != nil || id == 0 {
		return 0, fmt.Errorf("%w: network ID %q", ErrInvalid, s)
	}
	return id, nil
}

func (c *Controller) postNetwork(id vl2.NetworkID, r *http.Request) (any, error) {
	body, err := readBody(r)
	if err != nil {
		return nil, err
	}
	if id != 0 {
		n, err := c.UpdateNetwork(id, func(n *Network) error { return invalid(n.Patch(body)) })
		if !errors.Is(err, ErrNotFound) {
			return n, err
		}
	}
	n := DefaultNetwork()
	n.ID = id
	if err := n.Patch(body); err != nil {
		return nil, invalid(err)
	}
	return c.CreateNetwork(n)
}

// forNetwork finds the network of a path.
func (c *Controller) forNetwork(f func(Network, *http.Request) (any, error)) func(*http.Request) (any, error) {
	return func(r *http.Request) (any, error) {
		id, err := vl2.ParseNetworkID(r.PathValue("network"))
		if err != nil {
			return nil, ErrNotFound
		}
		n, ok := c.Network(id)
		if !ok {
			return nil, ErrNotFound
		}
		return f(n, r)
	}
}

// forMember finds the network and reads the address of a path.
func (c *Controller) forMember(f func(Network, identity.Address, *http.Request) (any, error)) func(*http.Request) (any, error) {
	return c.forNetwork(func(n Network, r *http.Request) (any, error) {
		a, err := identity.ParseAddress(strings.ToLower(r.PathValue("member")))
		if err != nil {
			return nil, ErrNotFound
		}
		return f(n, a, r)
	})
}

func (c *Controller) existing(n vl2.NetworkID, a identity.Address) (Member, error) {
	m, ok := c.Member(n, a)
	if !ok {
		return Member{}, ErrNotFound
	}
	return m, nil
}

func authorized(list []Member) (n int) {
	for i := range list {
		if list[i].Authorized {
			n++
		}
	}
	return n
}

func (c *Controller) allNetworks() (any, error) {
	data := []map[string]json.RawMessage{}
	for _, n := range c.Networks() {
		b, err := json.Marshal(n)
		if err != nil {
			return nil, err
		}
		keys := map[string]json.RawMessage{}
		if err := json.Unmarshal(b, &keys); err != nil {
			return nil, err
		}
		list := c.Members(n.ID)
		keys["meta"] = fmt.Appendf(nil, `{"totalMemberCount":%d,"authorizedMemberCount":%d}`, len(list), authorized(list))
		data = append(data, keys)
	}
	return map[string]any{"data": data, "meta": map[string]int{"networkCount": len(data)}}, nil
}
