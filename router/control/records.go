package control

import (
	"encoding/json"
	"strconv"
)

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

func ValidNodeAddress(s string) bool {
	_, err := strconv.ParseUint(s, 16, 64)
	return err == nil && len(s) == 10
}
