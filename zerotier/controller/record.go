package controller

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// marshalRecord writes the keys of plain over those in extra; the listed keys
// become null if they are empty text.
func marshalRecord(plain any, extra map[string]json.RawMessage, nullable string, forced map[string]any) ([]byte, error) {
	b, err := json.Marshal(plain)
	if err != nil {
		return nil, err
	}
	known := map[string]json.RawMessage{}
	if err := json.Unmarshal(b, &known); err != nil {
		return nil, err
	}
	for _, key := range strings.Split(nullable, ",") {
		if string(known[key]) == `""` {
			known[key] = json.RawMessage("null")
		}
	}
	out := make(map[string]any, len(known)+len(extra)+len(forced))
	for k, v := range extra {
		out[k] = v
	}
	for k, v := range known {
		out[k] = v
	}
	for k, v := range forced {
		out[k] = v
	}
	return json.Marshal(out) // ascending keys, so that equal records are equal bytes
}

// splitRecord returns all keys of a record that may be written back, and its ID.
func splitRecord(b []byte, idKeys ...string) (keys map[string]json.RawMessage, id string, err error) {
	if err := json.Unmarshal(b, &keys); err != nil {
		return nil, "", err
	}
	for _, k := range idKeys {
		if keys[k] != nil && id == "" {
			if err := json.Unmarshal(keys[k], &id); err != nil {
				return nil, "", err
			}
		}
	}
	for _, k := range []string{
		"clock", "authorizedMemberCount", "activeMemberCount", "totalMemberCount", "lastModified", // chapter 04 §7
		"physicalAddr", "recentLog", "lastRequestMetaData", "authenticationURL", "authenticationClientID", // §8
		"identity", "name", "certificateTimeoutWindowSize", // absent when empty
	} {
		delete(keys, k)
	}
	return keys, id, nil
}

// patchKeys returns the allowed keys of a JSON object.
func patchKeys(b []byte, allowed ...string) (map[string]json.RawMessage, error) {
	var body map[string]json.RawMessage
	if err := json.Unmarshal(b, &body); err != nil {
		return nil, fmt.Errorf("decode changes: %w", err)
	}
	if body == nil {
		return nil, errors.New("decode changes: want an object")
	}
	out := make(map[string]json.RawMessage, len(body))
	for _, k := range allowed {
		if v, ok := body[k]; ok {
			out[k] = v
		}
	}
	return out, nil
}

func decodeKeys(body map[string]json.RawMessage, into any) error {
	b, err := json.Marshal(body)
	if err != nil {
		return fmt.Errorf("decode changes: %w", err)
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("decode changes: %w", err)
	}
	return nil
}

func isArray(b []byte) bool {
	b = bytes.TrimSpace(b)
	return len(b) > 0 && b[0] == '['
}
