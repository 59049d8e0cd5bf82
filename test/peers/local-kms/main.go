// The program local-kms is local-kms (a KMS with AWS's protocol) behind a layer
// that makes it as AWS KMS is where the two differ: requests must be signed,
// permissions can be taken away, keys rotate on demand and know their key
// materials, and errors have AWS's names.
//
//	local-kms -addr 127.0.0.1:8080 -dir DIR -access-key ID -secret-key SECRET
//
// PUT /-/denied with a JSON list of actions ("kms:Encrypt") sets what is denied.
// Key policies are stored and not enforced.
package main

import (
	"bytes"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"net/http"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nsmithuk/local-kms/src/cmk"
	"github.com/nsmithuk/local-kms/src/config"
	"github.com/nsmithuk/local-kms/src/data"
	"github.com/nsmithuk/local-kms/src/handler"
	"github.com/nsmithuk/local-kms/src/service"
	"github.com/sirupsen/logrus"
)

func main() {
	addr := flag.String("addr", "127.0.0.1:8080", "where to listen")
	dir := flag.String("dir", "", "where keys are kept")
	s := &server{extras: map[string]*extra{}, log: logrus.New()}
	flag.StringVar(&s.accessKey, "access-key", "", "the one access key that may sign")
	flag.StringVar(&s.secretKey, "secret-key", "", "its secret")
	flag.StringVar(&config.AWSRegion, "region", "eu-central-1", "the region")
	flag.Parse()
	config.AWSAccountId = "111122223333"
	s.log.SetLevel(logrus.PanicLevel)
	s.db = data.NewDatabase(*dir)
	log.Fatal(http.ListenAndServe(*addr, s))
}

type server struct {
	accessKey, secretKey string
	db                   *data.Database
	log                  *logrus.Logger

	mu     sync.Mutex // one request at a time: the database has no transactions
	denied []string
	extras map[string]*extra // by key ARN
}

// extra is what local-kms does not keep of a key.
type extra struct {
	rotations []time.Time // of the second key material and the later ones
	pending   int         // an on-demand rotation is done when a key was described as often
	period    int         // days
}

// request is what the layer looks at of any request.
type request struct {
	KeyID                string `json:"KeyId"`
	CiphertextBlob       []byte
	Policy               *string
	RotationPeriodInDays *int
	IncludeKeyMaterial   string
	Limit                *int
	Marker               string
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.Method == http.MethodPut && r.URL.Path == "/-/denied" {
		s.denied = nil
		if err := json.Unmarshal(body, &s.denied); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
		}
		return
	}
	answer := s.answer(r, body)
	w.Header().Set("Content-Type", "application/x-amz-json-1.1")
	w.Header().Set("X-Amzn-Requestid", rand.Text())
	w.WriteHeader(answer.Code)
	_, _ = io.WriteString(w, answer.Body)
}

func (s *server) answer(r *http.Request, body []byte) handler.Response {
	if code, message := s.checkSignature(r, body); code != "" {
		return handler.New400ExceptionResponse(code, message)
	}
	service, op, _ := strings.Cut(r.Header.Get("X-Amz-Target"), ".")
	var in request
	switch {
	case service != "TrentService":
		return handler.New400ExceptionResponse("UnknownOperationException", "")
	case json.Unmarshal(body, &in) != nil:
		return handler.New400ExceptionResponse("SerializationException", "")
	case slices.Contains(s.denied, "kms:"+op):
		return handler.NewAccessDeniedExceptionResponse(fmt.Sprintf("User: arn:aws:iam::%s:user/test is not authorized to perform: kms:%s"+
			" on this resource because no identity-based policy allows the kms:%s action", config.AWSAccountId, op, op))
	case strings.Contains(in.KeyID, "alias/") && !slices.Contains([]string{"DescribeKey", "Encrypt", "Decrypt"}, op):
		return handler.NewNotFoundExceptionResponse("Invalid keyId " + in.KeyID)
	}
	switch op {
	case "CreateKey":
		if in.Policy != nil && !json.Valid([]byte(*in.Policy)) {
			return handler.New400ExceptionResponse("MalformedPolicyDocumentException", "")
		}
	case "DescribeKey":
		return s.describe(body, in)
	case "Decrypt":
		return s.decrypt(body, in)
	case "RotateKeyOnDemand", "ListKeyRotations", "EnableKeyRotation", "GetKeyRotationStatus":
		return s.rotation(op, body, in)
	case "CancelKeyDeletion":
		answer := s.call(op, body)
		if answer.Code == http.StatusOK { // AWS leaves the key disabled
			s.call("DisableKey", body)
		}
		return answer
	}
	return s.call(op, body)
}

// call calls local-kms.
func (s *server) call(op string, body []byte) (answer handler.Response) {
	h := handler.NewRequestHandler(&http.Request{Body: io.NopCloser(bytes.NewReader(body))}, s.log, s.db)
	method := reflect.ValueOf(h).MethodByName(op)
	if !method.IsValid() {
		return handler.New400ExceptionResponse("UnknownOperationException", "")
	}
	defer func() {
		if recover() != nil { // what it does with ciphertexts that are too short
			answer = handler.New400ExceptionResponse("InvalidCiphertextException", "")
		}
	}()
	answer, _ = reflect.TypeAssert[handler.Response](method.Call(nil)[0])
	return answer
}

// key returns the key that keyID or its alias names, or the answer that says why not.
func (s *server) key(keyID string) (*cmk.AesKey, *extra, handler.Response) {
	body, _ := json.Marshal(map[string]string{"KeyId": keyID})
	answer := s.call("DescribeKey", body)
	if answer.Code != http.StatusOK {
		return nil, nil, answer
	}
	var described struct{ KeyMetadata struct{ Arn string } }
	_ = json.Unmarshal([]byte(answer.Body), &described)
	key, _ := s.db.LoadKey(described.KeyMetadata.Arn)
	aes, ok := key.(*cmk.AesKey)
	if !ok {
		return nil, nil, handler.NewUnsupportedOperationException("not a symmetric key")
	}
	x := s.extras[aes.GetArn()]
	if x == nil {
		x = &extra{}
		s.extras[aes.GetArn()] = x
	}
	return aes, x, handler.Response{}
}

// material is the name of a key material. It tells nothing about the key.
func material(backing [32]byte) string {
	digest := sha256.Sum256(append([]byte("material"), backing[:]...))
	return hex.EncodeToString(digest[:])
}

func current(k *cmk.AesKey) string { return material(k.BackingKeys[len(k.BackingKeys)-1]) }

func (s *server) describe(body []byte, in request) handler.Response {
	answer := s.call("DescribeKey", body)
	key, x, bad := s.key(in.KeyID)
	if answer.Code != http.StatusOK || !bad.Empty() {
		return answer
	}
	if x.pending > 0 {
		if x.pending--; x.pending == 0 {
			var backing [32]byte
			_, _ = rand.Read(backing[:])
			key.BackingKeys = append(key.BackingKeys, backing)
			x.rotations = append(x.rotations, time.Now())
			_ = s.db.SaveKey(key)
		}
	}
	var out map[string]map[string]any
	_ = json.Unmarshal([]byte(answer.Body), &out)
	out["KeyMetadata"]["CurrentKeyMaterialId"] = current(key)
	return handler.NewResponse(http.StatusOK, out)
}

// decrypt makes local-kms name the errors as AWS does.
func (s *server) decrypt(body []byte, in request) handler.Response {
	invalid := handler.New400ExceptionResponse("InvalidCiphertextException", "")
	if len(in.CiphertextBlob) < 1 || len(in.CiphertextBlob) > 6144 {
		return handler.NewValidationExceptionResponse("1 validation error detected: Value at 'ciphertextBlob' failed to satisfy constraint")
	}
	if len(in.CiphertextBlob) < 1+int(in.CiphertextBlob[0])+4+12+16 {
		return invalid
	}
	name, version, _, ok := service.UnpackCiphertextBlob(in.CiphertextBlob)
	made, _, bad := s.key(name)
	if !ok || !bad.Empty() || made.GetArn() != name {
		return invalid
	}
	used := made
	if in.KeyID != "" {
		if used, _, bad = s.key(in.KeyID); !bad.Empty() {
			return bad
		}
	}
	switch used.GetMetadata().KeyState {
	case cmk.KeyStateDisabled:
		return handler.NewDisabledExceptionResponse(used.GetArn() + " is disabled.")
	case cmk.KeyStatePendingDeletion:
		return handler.NewKMSInvalidStateExceptionResponse(used.GetArn() + " is pending deletion.")
	}
	if used.GetArn() != made.GetArn() {
		return handler.New400ExceptionResponse("IncorrectKeyException", "The key ID in the request does not identify a CMK that can perform this operation.")
	}
	answer := s.call("Decrypt", body)
	var out map[string]any
	if answer.Code != http.StatusOK || json.Unmarshal([]byte(answer.Body), &out) != nil {
		return answer
	}
	out["KeyMaterialId"] = material(made.BackingKeys[version])
	return handler.NewResponse(http.StatusOK, out)
}

func (s *server) rotation(op string, body []byte, in request) handler.Response {
	key, x, bad := s.key(in.KeyID)
	if !bad.Empty() {
		return bad
	}
	switch state := key.GetMetadata().KeyState; {
	case state == cmk.KeyStatePendingDeletion:
		return handler.NewKMSInvalidStateExceptionResponse(key.GetArn() + " is pending deletion.")
	case state == cmk.KeyStateDisabled && (op == "RotateKeyOnDemand" || op == "EnableKeyRotation"):
		return handler.NewDisabledExceptionResponse(key.GetArn() + " is disabled.")
	}
	switch op {
	case "EnableKeyRotation":
		x.period = 365
		if in.RotationPeriodInDays != nil {
			if x.period = *in.RotationPeriodInDays; x.period < 90 || x.period > 2560 {
				return handler.NewValidationExceptionResponse("RotationPeriodInDays must be 90 to 2560")
			}
		}
		return s.call(op, body)
	case "GetKeyRotationStatus":
		out := map[string]any{"KeyId": key.GetArn(), "KeyRotationEnabled": x.period != 0}
		if x.period != 0 {
			out["RotationPeriodInDays"] = x.period
		}
		return handler.NewResponse(http.StatusOK, out)
	case "RotateKeyOnDemand":
		if x.pending > 0 {
			return handler.New400ExceptionResponse("ConflictException", "a rotation is in progress")
		}
		if len(x.rotations) >= 25 {
			return handler.New400ExceptionResponse("LimitExceededException", "on-demand rotation limit of 25 reached")
		}
		x.pending = 2 // AWS rotates some time after it has answered
		return handler.NewResponse(http.StatusOK, map[string]string{"KeyId": key.GetArn()})
	}
	return listRotations(key, x, in)
}

func listRotations(key *cmk.AesKey, x *extra, in request) handler.Response {
	var entries []map[string]any
	for i, backing := range key.BackingKeys {
		e := map[string]any{"KeyId": key.GetMetadata().KeyId, "KeyMaterialId": material(backing), "KeyMaterialState": "NON_CURRENT"}
		if i == len(key.BackingKeys)-1 {
			e["KeyMaterialState"] = "CURRENT"
		}
		if i > 0 {
			e["RotationDate"], e["RotationType"] = float64(x.rotations[i-1].UnixMilli())/1000, "ON_DEMAND"
		} else if in.IncludeKeyMaterial != "ALL_KEY_MATERIAL" {
			continue
		}
		entries = append(entries, e)
	}
	slices.Reverse(entries) // the newest first
	first := 0
	if in.Marker != "" {
		if _, err := fmt.Sscanf(in.Marker, "after-%d", &first); err != nil || first > len(entries) {
			return handler.New400ExceptionResponse("InvalidMarkerException", "")
		}
	}
	end := len(entries)
	if in.Limit != nil {
		end = min(end, first+*in.Limit)
	}
	out := map[string]any{"Rotations": entries[first:end], "Truncated": end < len(entries)}
	if end < len(entries) {
		out["NextMarker"] = fmt.Sprintf("after-%d", end)
	}
	return handler.NewResponse(http.StatusOK, out)
}

// checkSignature returns AWS's name of what is wrong with a request's Signature Version 4.
func (s *server) checkSignature(r *http.Request, body []byte) (code, message string) {
	header := regexp.MustCompile(`^AWS4-HMAC-SHA256 Credential=([^/]+)/(([0-9]{8})/([a-z0-9-]+)/(\w+)/aws4_request), SignedHeaders=([a-z0-9;-]+), Signature=([0-9a-f]{64})$`)
	part := header.FindStringSubmatch(r.Header.Get("Authorization"))
	if part == nil {
		return "MissingAuthenticationTokenException", "Missing Authentication Token"
	}
	accessKey, scope, day, region, service, signed, signature := part[1], part[2], part[3], part[4], part[5], part[6], part[7]
	date := r.Header.Get("X-Amz-Date")
	at, err := time.Parse("20060102T150405Z", date)
	switch {
	case accessKey != s.accessKey:
		return "UnrecognizedClientException", "The security token included in the request is invalid."
	case region != config.AWSRegion || service != "kms":
		return "InvalidSignatureException", "Credential should be scoped to a valid region."
	case err != nil || time.Since(at).Abs() > 5*time.Minute:
		return "InvalidSignatureException", "Signature expired: " + date
	}
	var headers strings.Builder
	for name := range strings.SplitSeq(signed, ";") {
		value := strings.Join(r.Header.Values(name), ",")
		switch name {
		case "host":
			value = r.Host
		case "content-length":
			value = fmt.Sprint(len(body))
		}
		fmt.Fprintf(&headers, "%s:%s\n", name, strings.TrimSpace(value))
	}
	hash := func(b string) string { d := sha256.Sum256([]byte(b)); return hex.EncodeToString(d[:]) }
	canonical := strings.Join([]string{r.Method, r.URL.EscapedPath(), r.URL.RawQuery, headers.String(), signed, hash(string(body))}, "\n")
	mac := []byte("AWS4" + s.secretKey)
	for _, text := range []string{day, region, service, "aws4_request", "AWS4-HMAC-SHA256\n" + date + "\n" + scope + "\n" + hash(canonical)} {
		h := hmac.New(sha256.New, mac)
		h.Write([]byte(text))
		mac = h.Sum(nil)
	}
	if hex.EncodeToString(mac) != signature {
		return "InvalidSignatureException", "The request signature we calculated does not match the signature you provided. The Canonical String for this request should have been\n'" + canonical + "'"
	}
	return "", ""
}
