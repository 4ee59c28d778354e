package controller

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strconv"
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
		v, ok := body[k]
		if !ok {
			continue
		}
		if convert := scalars[k]; convert != nil {
			if v, ok = convert(v); !ok {
				continue
			}
		}
		out[k] = v
	}
	return out, nil
}

// scalars are the keys that front ends send in other types too (chapter 04 §7): how to
// convert them; false leaves a key out.
var scalars = map[string]func(json.RawMessage) (json.RawMessage, bool){
	"private": lenientBool, "enableBroadcast": lenientBool, "ssoEnabled": lenientBool, "authorized": lenientBool,
	"activeBridge": lenientBool, "noAutoAssignIps": lenientBool, "ssoExempt": lenientBool,
	"multicastLimit": lenientInt, "mtu": lenientInt, "remoteTraceLevel": lenientInt, "certificateTimeoutWindowSize": lenientInt,
	"authenticationExpiryTime": lenientInt,
	"name":                     lenientText, "rulesSource": lenientText,
}

func lenientBool(v json.RawMessage) (json.RawMessage, bool) {
	var f float64
	var s string
	switch {
	case string(v) == "null":
		return nil, false
	case json.Unmarshal(v, &f) == nil:
		return strconv.AppendBool(nil, f > 0), true
	case json.Unmarshal(v, &s) == nil:
		// The reference takes any other text as false, which would make "private":
		// "yes" a public network.
		if b, err := strconv.ParseBool(s); err == nil {
			return strconv.AppendBool(nil, b), true
		}
	}
	return v, true
}

func lenientInt(v json.RawMessage) (json.RawMessage, bool) {
	var s string
	var f float64
	switch string(v) {
	case "null":
		return nil, false
	case "true":
		return []byte("1"), true
	case "false":
		return []byte("0"), true
	}
	if json.Unmarshal(v, &s) == nil {
		if _, err := strconv.ParseInt(s, 10, 64); err == nil {
			return []byte(s), true
		}
	} else if json.Unmarshal(v, &f) == nil && f == math.Trunc(f) && math.Abs(f) < 1<<53 {
		return strconv.AppendInt(nil, int64(f), 10), true
	}
	return v, true
}

func lenientText(v json.RawMessage) (json.RawMessage, bool) {
	switch string(v) {
	case "null":
		return []byte(`""`), true
	case "true":
		return []byte(`"1"`), true
	case "false":
		return []byte(`"0"`), true
	}
	if len(v) > 0 && (v[0] == '-' || v[0] >= '0' && v[0] <= '9') {
		return []byte(`"` + string(v) + `"`), true
	}
	return v, true
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
