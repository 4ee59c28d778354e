package control

import (
	"encoding/json"
	"strconv"
	"time"
)

// Record is a record of the network controller.
type Record struct {
	Schema int             `json:"schema"`
	Record json.RawMessage `json:"record"`
	State  *MemberState    `json:"state,omitempty"` // of a member
}

// Records is a list of them.
type Records struct {
	Schema  int                    `json:"schema"`
	Records []json.RawMessage      `json:"records"`
	States  map[string]MemberState `json:"states,omitempty"` // of members, by address
}

// MemberState is how the controller saw a member last, and where.
type MemberState struct {
	Asked       bool      `json:"asked"`                // for the network, now or ever
	Online      bool      `json:"online"`               // asked in the last two minutes, and has its configuration
	LastRequest time.Time `json:"lastRequest,omitzero"` // if that is less than two minutes ago
	Endpoint    string    `json:"physicalAddress,omitempty"`
	Link        string    `json:"link,omitempty"` // DIRECT, RELAY or NONE
}

// Missing says what a member lacks to be online, "" if it is.
func (m MemberState) Missing() string {
	switch {
	case m.Online:
		return ""
	case !m.Asked:
		return "has not asked for the network: join it there, and look whether its planet is the right one"
	case m.LastRequest.IsZero():
		return "has not asked in the last two minutes: is it on?"
	}
	return "waits for its configuration"
}

func ValidNodeAddress(s string) bool {
	_, err := strconv.ParseUint(s, 16, 64)
	return err == nil && len(s) == 10
}
