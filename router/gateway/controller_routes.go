package gateway

import (
	"encoding/json"
	"net/http"

	"ztgate/router/control"
	"ztgate/router/fault"
	"ztgate/zerotier/ztnode"
)

func (s *service) controllerRoutes(get func(string, func(*http.Request) (any, error))) {
	with := func(pattern string, f func(c Controller, id ztnode.NetworkID, r *http.Request) (any, error)) {
		get(pattern, func(r *http.Request) (any, error) {
			c := s.node.Controller()
			if c == nil {
				return nil, fault.Usagef("this node is no controller: start it with --controller")
			}
			var id ztnode.NetworkID
			if text := r.PathValue("id"); text != "" {
				var err error
				if id, err = ztnode.ParseNetworkID(text); err != nil {
					return nil, fault.Usage(err)
				}
			}
			return f(c, id, r)
		})
	}
	record := func(b json.RawMessage, err error) (any, error) {
		if err != nil {
			return nil, err
		}
		return control.Record{Schema: control.Schema, Record: b}, nil
	}
	patch := func(r *http.Request) (json.RawMessage, error) {
		var b json.RawMessage
		return b, control.ReadJSON(r, &b)
	}
	with("GET /v1/controller/networks", func(c Controller, _ ztnode.NetworkID, _ *http.Request) (any, error) {
		ids, err := c.Networks()
		if err != nil {
			return nil, err
		}
		out := control.Records{Schema: control.Schema, Records: []json.RawMessage{}}
		for _, id := range ids {
			b, err := c.Network(id)
			if err != nil {
				return nil, err
			}
			out.Records = append(out.Records, b)
		}
		return out, nil
	})
	set := func(c Controller, id ztnode.NetworkID, r *http.Request) (any, error) {
		b, err := patch(r)
		if err != nil {
			return nil, err
		}
		return record(c.SetNetwork(id, b))
	}
	with("POST /v1/controller/networks", set)
	with("POST /v1/controller/networks/{id}", set)
	with("GET /v1/controller/networks/{id}", func(c Controller, id ztnode.NetworkID, _ *http.Request) (any, error) {
		return record(c.Network(id))
	})
	with("DELETE /v1/controller/networks/{id}", func(c Controller, id ztnode.NetworkID, _ *http.Request) (any, error) {
		b, err := c.Network(id)
		if err != nil {
			return nil, err
		}
		return record(b, c.DeleteNetwork(id))
	})
	with("GET /v1/controller/networks/{id}/members", func(c Controller, id ztnode.NetworkID, _ *http.Request) (any, error) {
		list, err := c.Members(id)
		if err != nil {
			return nil, err
		}
		return control.Records{Schema: control.Schema, Records: append([]json.RawMessage{}, list...), States: s.memberStates(c, id, list)}, nil
	})
	with("GET /v1/controller/networks/{id}/members/{address}", func(c Controller, id ztnode.NetworkID, r *http.Request) (any, error) {
		if err := checkAddress(r); err != nil {
			return nil, err
		}
		b, err := c.Member(id, r.PathValue("address"))
		if err != nil {
			return nil, err
		}
		out := control.Record{Schema: control.Schema, Record: b}
		for _, st := range s.memberStates(c, id, []json.RawMessage{b}) {
			out.State = &st
		}
		return out, nil
	})
	with("POST /v1/controller/networks/{id}/members/{address}", func(c Controller, id ztnode.NetworkID, r *http.Request) (any, error) {
		if err := checkAddress(r); err != nil {
			return nil, err
		}
		b, err := patch(r)
		if err != nil {
			return nil, err
		}
		return record(c.SetMember(id, r.PathValue("address"), b))
	})
	with("DELETE /v1/controller/networks/{id}/members/{address}", func(c Controller, id ztnode.NetworkID, r *http.Request) (any, error) {
		if err := checkAddress(r); err != nil {
			return nil, err
		}
		b, err := c.Member(id, r.PathValue("address"))
		if err != nil {
			return nil, err
		}
		return record(b, c.DeleteMember(id, r.PathValue("address")))
	})
}

// observer is a controller that knows who is online.
type observer interface {
	Presence(id ztnode.NetworkID, address string) control.MemberState
}

// memberStates says how members were seen last, nil if the controller can't.
func (s *service) memberStates(c Controller, id ztnode.NetworkID, records []json.RawMessage) map[string]control.MemberState {
	o, ok := c.(observer)
	if !ok {
		return nil
	}
	peers := map[string]ztnode.Peer{}
	for _, p := range s.peers() {
		peers[p.Address] = p
	}
	out := map[string]control.MemberState{}
	for _, b := range records {
		var rec struct {
			Address string `json:"id"`
		}
		if json.Unmarshal(b, &rec) != nil {
			continue
		}
		st := o.Presence(id, rec.Address)
		if p, ok := peers[rec.Address]; ok {
			st.Link = p.Link
			if path, ok := bestPath(p); ok && p.Link == linkDirect {
				st.Endpoint = path.Endpoint.String()
			}
		}
		out[rec.Address] = st
	}
	return out
}

// checkAddress looks at the member that a request names.
func checkAddress(r *http.Request) error {
	if a := r.PathValue("address"); !control.ValidNodeAddress(a) {
		return fault.Usagef("member %q: want 10 hex digits, as in fcd8055969", a)
	}
	return nil
}
